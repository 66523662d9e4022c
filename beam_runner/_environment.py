"""What decides the bits of a result, set alike in all workers.

XLA on CPUs divides work among the threads that it finds, so the same StableHLO may give
other bits on a machine with other cores, or with another version of JAX.
"""

import contextlib
import os
import threading
import uuid
from importlib.metadata import version
from typing import NamedTuple

import jax

from drjax._chunks import cores


class Environment(NamedTuple):
    """A numeric environment: two that are equal give the same bits."""

    jax: str
    jaxlib: str
    platform: str
    device: str  # Its kind; of a CPU, the processor.
    devices: int
    threads: int
    x64: bool


def here() -> Environment:
    """The environment of this process; starts JAX's backend."""
    platform = jax.default_backend()
    kind = _processor() if platform == "cpu" else jax.devices()[0].device_kind
    return Environment(
        jax.__version__,
        version("jaxlib"),
        platform,
        kind,
        jax.local_device_count(),
        _threads(),
        bool(jax.config.read("jax_enable_x64")),
    )


def _threads() -> int:
    """The threads that XLA takes on a CPU: as NPROC says, or one for each core."""
    said = os.environ.get("NPROC", "")
    if said.isdigit():
        return int(said)
    return cores()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [
                line.split(":")[1].strip() for line in file if "model name" in line
            ]
        return lines[0]
    except (OSError, IndexError):
        import platform

        return platform.processor() or platform.machine()


class Recorded(NamedTuple):
    """The environment that a worker is to have, and the process that has it."""

    environment: Environment
    process: str


_TOKEN = uuid.uuid4().hex  # Several machines may have processes of one number.


def _process() -> str:
    return f"{_TOKEN} {os.getpid()}"


def record() -> Recorded:
    return Recorded(here(), _process())


_compared: dict[Recorded, list[str]] = {}
_lock = threading.Lock()


def set_alike(recorded: Recorded) -> list[str]:
    """Sets this process's JAX like the recorded one; says what remains different.

    Threads and devices can be set before JAX's backend has started, which is what it
    does in a worker whose first work this is.
    """
    if recorded.process == _process():
        return []
    with _lock:
        if recorded not in _compared:
            want = recorded.environment
            if not _compared:
                os.environ["NPROC"] = str(want.threads)
                jax.config.update("jax_platforms", want.platform)
                jax.config.update("jax_enable_x64", want.x64)
                if want.platform == "cpu":
                    with contextlib.suppress(RuntimeError):  # The backend runs.
                        jax.config.update("jax_num_cpu_devices", want.devices)
            fields = zip(Environment._fields, want, here(), strict=True)
            _compared[recorded] = [
                f"{name} is {got}, not {wanted}"
                for name, wanted, got in fields
                if got != wanted
            ]
        return _compared[recorded]
