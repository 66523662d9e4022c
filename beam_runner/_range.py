"""What a worker does with a range of a round: its chunks, one after the other."""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import jax
import numpy as np
from apache_beam.pvalue import TaggedOutput

from beam_runner import _files, _fold
from beam_runner._sources import read_good
from beam_runner._work import (
    LEFT,
    Arrays,
    BadElementError,
    Pick,
    Work,
    compare,
    count,
    loaded,
    picked,
    took,
)
from drjax._numpy import from_numpy, to_numpy


class RunRange(beam.DoFn):
    """`(range, first chunk, last chunk)` to what its chunks reduce to, `by_group`.

    Elements that are left out go to the output 'bad', as `(position, why)`.
    """

    def __init__(self, work: Work):
        self.work = work

    def setup(self) -> None:
        compare(self.work.environment)

    def process(self, element: Any, *producers: Any) -> Iterator[Any]:
        work, (index, first, last) = self.work, element
        start, waiting = time.perf_counter(), None
        with jax.enable_x64(work.environment.environment.x64):  # It is a thread's.
            run = Chunks(work, producers)
            for chunk in range(first, last):
                started = run.start(chunk)  # While it runs, the next one is read.
                if waiting is not None:
                    run.finish(waiting)
                waiting = started
            if waiting is not None:
                run.finish(waiting)
        took("range_ms", start)
        for bad in run.bad:
            yield TaggedOutput("bad", bad)
        count("elements", run.count)
        count("bad_elements", len(run.bad))
        count("bytes_down", sum(x.nbytes for x in run.server))
        if run.total is not None:
            count("bytes_up", sum(x.nbytes for x in run.total))
            total = [_files.stage(x, work.folder) for x in run.total]
            yield _fold.by_group(work.levels, index, total)
        if work.progress:
            done = _files.join(work.progress, f"{work.name}-{index}")
            _files.write(done, lambda _: None)


class Started(NamedTuple):
    """A chunk that runs: the positions of its elements, and its results."""

    chunk: int
    positions: np.ndarray
    outs: Sequence[Any]


class Chunks:
    """Runs chunks of a round one after the other, and folds what they give."""

    def __init__(self, work: Work, producers: Sequence[Any]):
        self.work, self.producers = work, producers
        self.server = picked(work.server, producers)
        n, self.skip = picked([work.n, work.skip], producers)
        self.n = int(n)
        self.program, self.full = loaded(work.program), loaded(work.full)
        avals = self.program.avals[2 : 2 + len(self.server)]
        self.on_device = [
            jax.device_put(from_numpy(x, aval))
            for x, aval in zip(self.server, avals, strict=True)
        ]
        self.total: Arrays | None = None
        self.bad: list[tuple[int, str]] = []
        self.count = 0

    def start(self, chunk: int) -> Started:
        positions, rows = self.read(chunk, self.failed)
        outs = self.call(positions, rows) if len(positions) else []
        return Started(chunk, positions, outs)

    def call(self, positions: np.ndarray, rows: Arrays) -> Sequence[Any]:
        """Starts the program for some elements, fewer than a chunk has perhaps."""
        count = len(positions)
        inputs = [positions, *rows]
        if missing := self.work.chunk - count:
            inputs = [
                np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) for x in inputs
            ]
        # Copies, for a source may use its arrays again while a chunk is computed.
        index, *placed = jax.device_put(inputs, may_alias=False)
        avals = self.program.avals[2 + len(self.server) :]
        placed = map(from_numpy, placed, avals)
        if not missing:
            return self.full(index, *self.on_device, *placed)
        return self.program(np.int32(count), index, *self.on_device, *placed)

    def finish(self, started: Started) -> None:
        positions, outs = started.positions, [*map(to_numpy, started.outs)]
        if self.work.on_bad != "keep" and len(positions):
            is_bad = self.are_bad(started, outs)
            if is_bad.any():
                for i in positions[is_bad]:
                    self.failed(int(i), None)
                positions, outs = positions[~is_bad], []
                if len(positions):
                    rows = [x[~is_bad] for x in self.read_again(started.chunk)]
                    outs = [*map(to_numpy, self.call(positions, rows))]
        if self.work.outputs.dtypes:
            self.write(started.chunk, positions, outs[self.parts :])
        if len(positions):
            self.count += len(positions)
            operations, reduced = self.work.operations, outs[: self.parts]
            if self.total is None:
                self.total = _fold.widened(operations, reduced)
            else:
                _fold.add(operations, self.total, reduced)

    @property
    def parts(self) -> int:
        """How many of the program's results are reduced; the others are placed."""
        return len(self.work.operations)

    def write(self, chunk: int, positions: np.ndarray, outs: Arrays) -> None:
        """Writes placed outputs; rows of elements that are left out are NaN or 0."""
        low = chunk * self.work.chunk
        size, count = min(self.work.chunk, self.n - low), len(positions)
        if count < size:
            whole = [*map(_empty, self.program.out_avals[self.parts :])]
            for x, out in zip(whole, outs, strict=False):  # None, if all are bad.
                x[positions - low] = out[:count]
            outs = whole
        self.work.outputs.write(chunk, [x[:size] for x in outs])

    def read_again(self, chunk: int) -> Arrays:
        return self.read(chunk, lambda i, error: None)[1]

    def read(
        self, chunk: int, failed: Callable[[int, Exception], None]
    ) -> tuple[np.ndarray, Arrays]:
        """The rows of all placed inputs, of the elements for which all can be read."""
        low = chunk * self.work.chunk
        high = min(low + self.work.chunk, self.n)
        wanted = np.arange(low, high, dtype=np.int32)
        if self.skip.size:
            wanted = np.setdiff1d(wanted, self.skip, assume_unique=True)
        groups = []
        for rows in self.work.placed:
            if isinstance(rows.reader, Pick):
                (x,) = picked([rows.reader], self.producers)
                leaves = [np.moveaxis(x, rows.leaves[0], 0)[wanted]]
                taken: tuple[int, ...] = (0,)
            else:
                wanted, leaves = read_good(rows.reader, low, high, wanted, failed)
                taken = rows.leaves
            groups.append((wanted, leaves, taken, rows.inputs))
        if not len(wanted):
            return wanted, []
        placed: dict[int, np.ndarray] = {}
        for positions, leaves, taken, inputs in groups:
            kept = slice(None)
            if len(positions) > len(wanted):  # A later reader lacks some of them.
                kept = np.isin(positions, wanted)
            for leaf, k in zip(taken, inputs, strict=True):
                placed[k] = leaves[leaf][kept]
        return wanted, [placed[k] for k in range(len(placed))]

    def failed(self, i: int, error: Exception | None) -> None:
        """Notes an element that is bad; or raises, as is asked for."""
        why = "it gives values that are not finite"
        if not all(map(_is_finite, self.server)):
            why += ", and some that the server sends to it are not either"
        if error is not None:
            why = f"it cannot be read: {type(error).__name__}: {error}"
        if self.work.on_bad != "collect":
            advice = (
                "Mend it; or run with on_bad='collect', which leaves such elements out"
            )
            if self.work.on_bad == LEFT:
                advice = (
                    "It became so when others were left out, and a pipeline does not "
                    "start again: leave it out before, or use beam_runner.run"
                )
            elif error is None:
                advice += ", or with on_bad='keep', which gives what jit gives"
            where = "".join(traceback.format_exception(error)) if error else ""
            raise BadElementError(
                f"beam_runner: element {i} of {self.work.placement!r} is bad: {why}. "
                f"{advice}.\n{where}"
            ) from error
        self.bad.append((i, why))

    def are_bad(self, started: Started, outs: Arrays) -> np.ndarray:
        """Which of the elements of a chunk give something that is not finite."""
        positions = started.positions
        is_bad = np.zeros(len(positions), bool)
        for x in outs[self.parts :]:
            if x.dtype.kind not in "biu":
                is_bad |= ~_finite_rows(x[: len(positions)])
        if self.is_finite(outs):
            return is_bad
        rows = self.read_again(started.chunk)
        halves = [np.arange(len(positions))]
        while halves:  # To look for those that are bad takes few more runs.
            some = halves.pop()
            if len(some) < len(positions):
                parts = self.call(positions[some], [x[some] for x in rows])
                if self.is_finite([*map(to_numpy, parts)]):
                    continue
            if len(some) == 1:
                is_bad[some] = True
            else:
                halves += np.array_split(some, 2)
        return is_bad

    def is_finite(self, outs: Arrays) -> bool:
        return all(map(_fold.is_finite, self.work.operations, outs[: self.parts]))


def _finite_rows(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.isfinite(x).all(axis=tuple(range(1, x.ndim))))


def _is_finite(x: np.ndarray) -> bool:
    return x.dtype.kind in "biu" or bool(np.isfinite(x).all())


def _empty(aval: Any) -> np.ndarray:
    """Rows of what elements that are left out would have given."""
    x = np.array(to_numpy(jax.numpy.zeros(aval.shape, aval.dtype)))
    if x.dtype.kind not in "biu":
        x[...] = np.nan
    return x
