"""The digits of `digits_fedavg.py`, trained by two processes.

Each process is what one machine would run: it holds the data of half the clients. The
program stays as it is; a mesh over all processes spreads it, and the sums of a round
are what crosses between them. On machines of their own, start each with the address of
the first:

    python -m examples.digits_processes --coordinator first:1234 --process 0
    python -m examples.digits_processes --coordinator first:1234 --process 1

Without arguments, it starts both here, and compares them with a single process.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples import digits_fedavg as digits

PROCESSES = 2


def make_mesh(share: int) -> Mesh:
    """As many devices of each process as its share of clients can be split over."""
    own = max(n for n in range(1, jax.local_device_count() + 1) if share % n == 0)
    devices = [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process_index=process)[:own]
    ]
    return jax.make_mesh(
        (len(devices),), ("clients",), axis_types=(AxisType.Auto,), devices=devices
    )


def train(rounds: int) -> Any:
    """Trains on devices of all processes; returns the parameters."""
    share = digits.CLIENTS // jax.process_count()
    mesh = make_mesh(share)
    clients, test = digits.load_data(seed=0)
    first = jax.process_index() * share
    clients = jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(
            NamedSharding(mesh, P("clients")), x[first : first + share]
        ),
        clients,
    )
    params = digits.MODEL.init(jax.random.key(0), test.images[:1])
    state = digits.State(params, digits.server_optimizer(1.0).init(params))
    with jax.set_mesh(mesh):
        # The result of a round is whole on every device.
        run_round = jax.jit(digits.federated_round, out_shardings=P())
        for _ in range(rounds):
            state = run_round(digits.RATES, state, clients)
    return jax.tree.map(np.asarray, state.params)


def accuracy(params: Any) -> float:
    _, test = digits.load_data(seed=0)
    return float(np.mean(digits.predict(params, test.images).argmax(-1) == test.labels))


def run_process(process: int, coordinator: str, rounds: int, output: Path) -> None:
    jax.distributed.initialize(coordinator, PROCESSES, process)
    params = train(rounds)
    print(f"Process {process} of {jax.process_count()}: {accuracy(params):.1%}")
    if process == 0:
        np.savez(output, *jax.tree.leaves(params))


def compare(rounds: int) -> None:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        coordinator = f"localhost:{server.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "params.npz"
        command = [sys.executable, "-m", "examples.digits_processes"]
        command += [f"--coordinator={coordinator}", f"--rounds={rounds}"]
        command += [f"--output={output}"]
        started = [
            subprocess.Popen([*command, f"--process={i}"]) for i in range(PROCESSES)
        ]
        if any(process.wait() for process in started):
            sys.exit("A process failed.")
        with np.load(output) as saved:
            together = [saved[name] for name in saved]
    alone = train(rounds)
    print(f"A single process: {accuracy(alone):.1%}")
    difference = max(
        np.abs(a - b).max()
        for a, b in zip(together, jax.tree.leaves(alone), strict=True)
    )
    print(f"Largest difference between any two parameters: {difference:.0e}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--process", type=int, help="which process this is")
    parser.add_argument("--coordinator", help="host:port of the first process")
    parser.add_argument("--output", type=Path, default=Path("digits_processes.npz"))
    args = parser.parse_args(argv)
    if args.process is None:
        compare(args.rounds)
    else:
        run_process(args.process, args.coordinator, args.rounds, args.output)


if __name__ == "__main__":
    main()
