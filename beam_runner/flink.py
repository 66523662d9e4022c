"""Runs Beam pipelines on a Flink cluster of this machine.

A job manager, task managers and Beam's job server run in Java virtual machines of their
own; each task manager starts Python workers, without Docker. All of them listen on the
loopback interface only, and stop with the process that started them::

    python -m beam_runner.flink --folder .flink --fetch -- python pipeline.py

The command finds the options of a pipeline, one a line, in `FLINK_FLAGS`. Workers have
the Python, the environment and the working directory of this process; what a pipeline
imports must be importable there, for nothing that Beam stages is used.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator

FLAGS_VARIABLE = "FLINK_FLAGS"
# The newest of Beam's runner for Flink that Maven Central has all parts of, with the
# Flink that it is for. Beam 2.77 for Python speaks to it.
DEPENDENCIES = (
    ("org.apache.beam", "beam-runners-flink-1.19", "2.62.0"),
    ("org.jboss.byteman", "byteman", "4.0.27"),
    ("org.slf4j", "slf4j-simple", "1.7.30"),
)
JOB_MANAGER = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
TASK_MANAGER = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
JOB_SERVER = "org.apache.beam.runners.flink.FlinkJobServerDriver"
HOST = "127.0.0.1"
# Also of the loopback interface: reached only by what listens on every interface.
OTHER_HOST = "127.0.0.2"
START_SECONDS, STOP_SECONDS = 120.0, 10.0
# Idle workers end after this, and so does the memory of those that died. As a job
# is restarted later than that, and than the loss of a task manager is noticed, it
# is restarted with what still lives.
IDLE_SECONDS, RESTART_SECONDS = 3, 6

# Small machines are the common case: quick to start, and small.
JVM = [
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Xmx384m",
    "-XX:MaxDirectMemorySize=512m",
    "-XX:MaxMetaspaceSize=192m",
]

# Two slots let one task manager take over the work of another, which the load
# balancing keeps apart while both live. Flink's own scripts, not used here, would
# derive the sizes; its default for the shuffle's buffers wants 16 MB a shuffle.
SETTINGS = """
jobmanager.bind-host: 127.0.0.1
jobmanager.rpc.address: 127.0.0.1
rest.address: 127.0.0.1
rest.bind-address: 127.0.0.1
taskmanager.host: 127.0.0.1
taskmanager.bind-host: 127.0.0.1
taskmanager.numberOfTaskSlots: 2
taskmanager.load-balance.mode: SLOTS
taskmanager.cpu.cores: 1.0
taskmanager.memory.framework.heap.size: 128m
taskmanager.memory.framework.off-heap.size: 128m
taskmanager.memory.task.heap.size: 256m
taskmanager.memory.task.off-heap.size: 256m
taskmanager.memory.network.min: 128m
taskmanager.memory.network.max: 128m
taskmanager.memory.managed.size: 64m
taskmanager.memory.jvm-metaspace.size: 192m
taskmanager.memory.jvm-overhead.min: 64m
taskmanager.memory.jvm-overhead.max: 64m
taskmanager.network.sort-shuffle.min-buffers: 64
heartbeat.interval: 1000
heartbeat.timeout: 20000
"""

# Beam's servers listen on every interface, and its job server sends all its jars
# with each job. Neither can be configured, so the agent Byteman patches both. The
# task managers have the jars on their class path already.
PATCHES = """
RULE listen on loopback only
CLASS org.apache.beam.vendor.grpc.v1p60p1.io.grpc.netty.NettyServerBuilder
METHOD forPort(int)
IF TRUE
DO RETURN org.apache.beam.vendor.grpc.v1p60p1.io.grpc.netty.NettyServerBuilder
    .forAddress(new java.net.InetSocketAddress("127.0.0.1", $1))
ENDRULE

RULE send no jars
CLASS org.apache.beam.sdk.util.construction.resources.PipelineResources
METHOD detectClassPathResourcesToStage
IF TRUE
DO RETURN new java.util.ArrayList()
ENDRULE
"""


def fetch(folder: pathlib.Path) -> None:
    """Gets Flink and Beam's runner for it from Maven, unless they are there.

    Args:
        folder: Where to keep them, in a folder `lib`.

    Raises:
        FileNotFoundError: If Maven is not installed.
        RuntimeError: If Maven fails, or leaves out what was asked for.
    """
    folder = folder.resolve()  # Maven takes a path from where the project is.
    if (folder / "lib").exists():
        return
    maven = _program("mvn")
    folder.mkdir(parents=True, exist_ok=True)
    dependencies = "".join(
        f"<dependency><groupId>{group}</groupId><artifactId>{name}</artifactId>"
        f"<version>{version}</version></dependency>"
        for group, name, version in DEPENDENCIES
    )
    # Filled elsewhere and moved at the end, `lib` is never half full.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        project = pathlib.Path(scratch, "pom.xml")
        library = pathlib.Path(scratch, "lib")
        project.write_text(
            "<project><modelVersion>4.0.0</modelVersion><groupId>local</groupId>"
            "<artifactId>flink</artifactId><version>1</version>"
            f"<dependencies>{dependencies}</dependencies></project>"
        )
        command = [maven, "--batch-mode", "--quiet", "--strict-checksums", "--file"]
        command += [str(project), "dependency:copy-dependencies"]
        command += ["-DincludeScope=runtime", f"-DoutputDirectory={library}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        names = [f"{name}-{version}.jar" for _, name, version in DEPENDENCIES]
        missing = [name for name in names if not (library / name).is_file()]
        if done.returncode or missing:
            raise RuntimeError(f"Maven did not bring {missing}:\n{done.stdout}")
        library.rename(folder / "lib")


@contextlib.contextmanager
def cluster(
    folder: pathlib.Path, task_managers: int = 2, restarts: int = 0
) -> Generator[list[str]]:
    """Runs a Flink cluster for as long as the context lasts.

    Args:
        folder: Where `fetch` put Flink.
        task_managers: How many task managers, and so Python workers, to run.
        restarts: How often a job is restarted, after a worker or a task manager
            died, but also after an exception in a pipeline's own code.

    Yields:
        The options with which a pipeline runs on the cluster.

    Raises:
        FileNotFoundError: If Java is not installed, or Flink was not fetched.
        RuntimeError: If the cluster does not start.
    """
    library = folder.resolve() / "lib"
    if not library.is_dir():
        raise FileNotFoundError(f"Flink is not in {folder}: fetch it first.")
    java = _program("java")
    work = pathlib.Path(tempfile.mkdtemp(prefix="flink-"))
    # Its standard input ends when this process does, however that happens.
    guard = subprocess.Popen(
        [sys.executable, __file__, "guard", str(work)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert guard.stdin is not None
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        rpc_port, rest_port, job_port = _free_ports(3)
        strategy = "fixed-delay" if restarts else "none"
        (work / "config.yaml").write_text(
            f"{SETTINGS}jobmanager.rpc.port: {rpc_port}\nrest.port: {rest_port}\n"
            f"io.tmp.dirs: {work}\nrestart-strategy.type: {strategy}\n"
            f"restart-strategy.fixed-delay.attempts: {restarts or 1}\n"
            f"restart-strategy.fixed-delay.delay: {RESTART_SECONDS} s\n"
        )
        (work / "patches").write_text(PATCHES)
        (agent,) = library.glob("byteman-*.jar")
        launch = [java, f"-javaagent:{agent}=script:{work}/patches", *JVM]
        launch += [f"-Djava.io.tmpdir={work}", "-cp", f"{library}/*"]
        server = [JOB_SERVER, f"--flink-master={HOST}:{rest_port}"]
        server += [f"--job-host={HOST}", f"--job-port={job_port}", "--artifact-port=0"]
        server += ["--expansion-port=0", f"--artifacts-dir={work}/artifacts"]
        commands = {"job-manager": [JOB_MANAGER, "--configDir", str(work)]}
        commands["job-server"] = server
        for index in range(task_managers):
            command = [TASK_MANAGER, "--configDir", str(work)]
            commands[f"task-manager-{index}"] = command
        for name, command in commands.items():
            with open(work / f"{name}.log", "wb") as log:
                processes[name] = subprocess.Popen(
                    launch + command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            guard.stdin.write(b"%d\n" % processes[name].pid)
            guard.stdin.flush()
        _wait(work, processes, rest_port, job_port, task_managers)
        yield [
            "--runner=PortableRunner",
            f"--job_endpoint={HOST}:{job_port}",
            "--environment_type=PROCESS",
            "--environment_config=" + json.dumps({"command": _worker_command(work)}),
            # Without it each stage of a job would start its own workers.
            f"--environment_cache_millis={IDLE_SECONDS * 1000}",
            f"--parallelism={task_managers}",
        ]
    finally:
        guard.stdin.close()
        for process in [*processes.values(), guard]:
            process.wait()


def _program(name: str) -> str:
    """Finds a program on the path."""
    if path := shutil.which(name):
        return path
    raise FileNotFoundError(f"{name} is needed to run Flink, but is not on the path.")


def _free_ports(count: int) -> list[int]:
    """Finds ports of the loopback interface which nothing uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def _worker_command(work: pathlib.Path) -> str:
    """Writes a program for Beam, which takes no arguments but its own."""
    command = shlex.join([sys.executable, str(pathlib.Path(__file__).resolve())])
    log = shlex.quote(str(work / "workers.log"))
    program = work / "worker"
    program.write_text(f'#!/bin/sh\nexec {command} worker "$@" >>{log} 2>&1\n')
    program.chmod(0o700)
    return str(program)


def _wait(
    work: pathlib.Path,
    processes: dict[str, subprocess.Popen[bytes]],
    rest_port: int,
    job_port: int,
    task_managers: int,
) -> None:
    """Waits until a cluster takes jobs."""
    deadline = time.monotonic() + START_SECONDS
    while _registered(rest_port) < task_managers or not _listens(HOST, job_port):
        dead = [name for name, each in processes.items() if each.poll() is not None]
        if dead or time.monotonic() > deadline:
            name = dead[0] if dead else "job-manager"
            tail = (work / f"{name}.log").read_text(errors="replace")[-4000:]
            problem = "ended" if dead else f"is not ready after {START_SECONDS:g} s"
            raise RuntimeError(f"Flink's {name} {problem}. Its log ends:\n{tail}")
        time.sleep(0.2)
    if _listens(OTHER_HOST, job_port):
        raise RuntimeError("Beam's job server listens beyond the loopback interface.")


def _registered(rest_port: int) -> int:
    """Counts the task managers which a job manager knows."""
    # A proxy does not reach this machine's loopback interface.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{HOST}:{rest_port}/overview", timeout=5) as answer:
            return int(json.load(answer)["taskmanagers"])
    except OSError:
        return 0


def _listens(host: str, port: int) -> bool:
    """Tells whether something listens there."""
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex((host, port)) == 0


def _guard(work: pathlib.Path) -> None:
    """Stops the process groups named on standard input when that ends."""
    groups = {int(line) for line in sys.stdin}
    _signal(groups, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while groups and time.monotonic() < deadline:
        time.sleep(0.05)
        _signal(groups, 0)
    _signal(groups, signal.SIGKILL)
    shutil.rmtree(work, ignore_errors=True)


def _signal(groups: set[int], number: int) -> None:
    """Sends a signal, 0 for none, to process groups, and drops those that ended."""
    for group in list(groups):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            groups.remove(group)


def _work(arguments: list[str]) -> None:
    """Becomes a Python worker, in the way Beam's containers do."""
    # Only workers need Beam.
    import grpc
    from apache_beam.portability.api import beam_provision_api_pb2 as messages
    from apache_beam.portability.api import beam_provision_api_pb2_grpc as services
    from google.protobuf import json_format, text_format

    parser = argparse.ArgumentParser()
    parser.add_argument("--id", required=True)
    parser.add_argument("--provision_endpoint", required=True)
    options, _ = parser.parse_known_args(arguments)
    with grpc.insecure_channel(options.provision_endpoint) as channel:
        info = (
            services.ProvisionServiceStub(channel)
            .GetProvisionInfo(
                messages.GetProvisionInfoRequest(), metadata=[("worker_id", options.id)]
            )
            .info
        )
    control, logs = info.control_endpoint, info.logging_endpoint
    environment = {
        "WORKER_ID": options.id,
        "PIPELINE_OPTIONS": json_format.MessageToJson(info.pipeline_options),
        "RUNNER_CAPABILITIES": " ".join(info.runner_capabilities),
        "CONTROL_API_SERVICE_DESCRIPTOR": text_format.MessageToString(control),
        "LOGGING_API_SERVICE_DESCRIPTOR": text_format.MessageToString(logs),
    }
    command = [sys.executable, "-m", "apache_beam.runners.worker.sdk_worker_main"]
    os.execve(sys.executable, command, {**os.environ, **environment})


def main() -> int:
    """Runs a command, or waits for an interrupt, beside a cluster."""
    if sys.argv[1:2] == ["guard"]:
        _guard(pathlib.Path(sys.argv[2]))
        return 0
    if sys.argv[1:2] == ["worker"]:
        _work(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m beam_runner.flink", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--fetch", action="store_true", help="get Flink if need be")
    parser.add_argument("--task-managers", type=int, default=2)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("command", nargs="*", help="what to run, after --")
    options = parser.parse_args()
    if options.fetch:
        fetch(options.folder)
    with (
        contextlib.suppress(KeyboardInterrupt),
        cluster(options.folder, options.task_managers, options.restarts) as flags,
    ):
        print(*flags, sep="\n", flush=True)
        if options.command:
            environment = {**os.environ, FLAGS_VARIABLE: "\n".join(flags)}
            done = subprocess.run(options.command, env=environment, check=False)
            return done.returncode
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
