"""What workers get, and what they run of the server's; rounds are in `_range`.

A worker needs this package and what the sources need, and neither the program nor its
plan: rounds and server stages come as StableHLO. Chunks, and ranges of chunks, are
fixed by index, and what they give is folded in the order of their index, so a result
has the same bits however the runner bundles, orders or repeats the work.
"""

import functools
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import jax
import numpy as np
from apache_beam.metrics.metric import Metrics

from beam_runner import _environment, _files
from beam_runner._sources import ChunkFiles, Reader, Whole
from drjax._numpy import from_numpy, to_numpy

Arrays = list[np.ndarray]
METRICS = "drjax"  # The namespace.
ON_BAD = ("raise", "collect", "keep")
LEFT = "left"  # As "raise", where others were left out before.


class BadElementError(ValueError):
    """An element cannot be read, or gives what is not finite."""


def check_some_remain(placement: str, n: int, why: Mapping[int, str]) -> None:
    """Raises if all elements of a placement are bad, of which it is known why."""
    if len(why) >= n:
        raise BadElementError(
            f"beam_runner: all {n} elements of {placement!r} are bad; element "
            f"{min(why)}: {why[min(why)]}. Are the values that the server sends to "
            "them finite?"
        )


class Pick(NamedTuple):
    """A value of the server: in what a producer gives, or known from the start."""

    producer: int | None
    value: Any  # Its position there; or an array, staged or not, or a `Whole`.


class Rows(NamedTuple):
    """Placed inputs that are read together: leaf `leaves[k]` is input `inputs[k]`."""

    reader: Reader | Pick  # A `Pick` is what the server hands out, along an axis.
    leaves: tuple[int, ...]
    inputs: tuple[int, ...]


class Work(NamedTuple):
    """A round, as data.

    Args:
      name: of the round, unlike those of others.
      program: StableHLO of a chunk, see `drjax.plan.MapReduce.export`.
      full: the same of a full chunk, without a mask, which XLA makes faster.
      placement: its name.
      chunk: elements in one.
      n: where the number of elements is.
      server: where the server's values are.
      placed: what reads the placed inputs.
      skip: where the positions of elements that are left out are.
      operations, dtypes: how what it reduces is combined, and what it is.
      levels: in how many levels that is folded.
      outputs: where its placed outputs are written.
      on_bad: 'raise', 'collect' or 'keep'.
      folder: where large values are staged.
      environment: what the workers are to have.
      progress: a folder with a file for each range that is done, or None.
    """

    name: str
    program: bytes
    full: bytes
    placement: str
    chunk: int
    n: Pick
    server: tuple[Pick, ...]
    placed: tuple[Rows, ...]
    skip: Pick
    operations: tuple[str, ...]
    dtypes: tuple[Any, ...]
    levels: int
    outputs: ChunkFiles
    on_bad: str
    folder: str
    environment: _environment.Recorded
    progress: str | None


class Program:
    """A function of arrays, from StableHLO; compiled when it is first called."""

    def __init__(self, exported: Any):
        self.avals, self.out_avals = exported.in_avals, exported.out_avals
        self._exported, self._lock, self._compiled = exported, threading.Lock(), None

    def __call__(self, *args: Any) -> Sequence[Any]:
        with self._lock:  # Threads that need the same one wait for it.
            if self._compiled is None:
                start = time.perf_counter()
                lowered = jax.jit(self._exported.call).lower(*self.avals)
                self._compiled = lowered.compile()
                took("compile_ms", start)
        return self._compiled(*args)


PROGRAMS = 128  # That are kept in a process.
_programs: dict[Any, Program] = {}


@functools.lru_cache(maxsize=PROGRAMS)
def loaded(program: bytes) -> Program:
    """The function of a stage, the same one in all of a process."""
    exported = jax.export.deserialize(bytearray(program))
    # Bytes also tell from which lines of code it is: these make no other program.
    lines = exported.mlir_module().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#loc"))
    is_whole = "__elided__" not in text  # As MLIR prints what it leaves out.
    key = text if is_whole else program, exported.in_avals, exported.out_avals
    if len(_programs) >= PROGRAMS:
        _programs.clear()
    return _programs.setdefault(key, Program(exported))


def picked(picks: Sequence[Pick], producers: Sequence[Any]) -> Arrays:
    return [_picked(pick, producers) for pick in picks]


def _picked(pick: Pick, producers: Sequence[Any]) -> np.ndarray:
    if pick.producer is not None:
        return _files.load(producers[pick.producer][pick.value])
    is_whole = isinstance(pick.value, Whole)
    return pick.value.value() if is_whole else _files.load(pick.value)


class Serve(beam.DoFn):
    """A server stage: what it gives, for an element that only starts it."""

    def __init__(
        self, program: bytes, picks: Sequence[Pick], folder: str, environment: Any
    ):
        self.program, self.picks = program, picks
        self.folder, self.environment = folder, environment

    def setup(self) -> None:
        compare(self.environment)

    def process(self, element: Any, *producers: Any) -> Iterator[Any]:
        with jax.enable_x64(self.environment.environment.x64):  # It is a thread's.
            run = loaded(self.program)
            inputs = map(from_numpy, picked(self.picks, producers), run.avals)
            outs = [*map(to_numpy, run(*inputs))]
        yield [_files.stage(x, self.folder) for x in outs]


def compare(environment: Any) -> None:
    for difference in _environment.set_alike(environment):
        Metrics.counter(METRICS, "environment_differences").inc()
        logging.getLogger("beam_runner").warning(
            "beam_runner: a worker has another numeric environment than the driver, so "
            "results may differ in their last bits: %s",
            difference,
        )


def count(name: str, value: int) -> None:
    Metrics.counter(METRICS, name).inc(value)


def took(name: str, start: float) -> None:
    milliseconds = round(1000 * (time.perf_counter() - start))
    Metrics.distribution(METRICS, name).update(milliseconds)
