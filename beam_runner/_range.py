"""What a worker does with a range of a round: its chunks, one after the other."""

import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import jax
import numpy as np
from apache_beam.pvalue import TaggedOutput

from beam_runner import _files, _fold
from beam_runner._sources import read_good
from beam_runner._work import (
    Arrays,
    BadElementError,
    Pick,
    Work,
    compare,
    compiled,
    count,
    from_numpy,
    picked,
    to_numpy,
    took,
)


class RunRange(beam.DoFn):
    """`(range, first chunk, last chunk) -> (range, what its chunks reduce to)`.

    Elements that are left out go to the output 'bad', as `(position, why)`.
    """

    def __init__(self, work: Work):
        self.work = work

    def setup(self) -> None:
        compare(self.work.environment)

    def process(self, element: Any, *producers: Any) -> Iterator[Any]:
        work, (index, first, last) = self.work, element
        run = Chunks(work, producers)
        start, waiting = time.perf_counter(), None
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
            yield index, [_files.stage(x, work.folder) for x in run.total]
        if work.progress:
            done = _files.join(work.progress, f"{index}-{last - first}")
            _files.write(done, lambda _: None)


class Started(NamedTuple):
    """A chunk that runs: its elements, their rows, and what will be there."""

    chunk: int
    good: list[int]
    rows: Arrays
    outs: Sequence[Any]


class Chunks:
    """Runs chunks of a round one after the other, and folds what they give."""

    def __init__(self, work: Work, producers: Sequence[Any]):
        self.work, self.producers = work, producers
        self.server = picked(work.server, producers)
        self.n = int(picked([work.n], producers)[0])
        self.skip = {*picked([work.skip], producers)[0].tolist()}
        self.program = compiled(work.program)
        avals = self.program.avals[2 : 2 + len(self.server)]
        self.on_device = [
            jax.device_put(from_numpy(x, aval))
            for x, aval in zip(self.server, avals, strict=True)
        ]
        self.total: Arrays | None = None
        self.bad: list[tuple[int, str]] = []
        self.count = 0

    def start(self, chunk: int) -> Started:
        low = chunk * self.work.chunk
        high = min(low + self.work.chunk, self.n)
        good, rows = self.read(low, high)
        return Started(chunk, good, rows, self.call(good, rows) if good else [])

    def call(self, numbers: list[int], rows: Arrays) -> Sequence[Any]:
        """Starts the program for some elements, fewer than a chunk has perhaps."""
        missing = self.work.chunk - len(numbers)
        index = np.array([*numbers, *numbers[:1] * missing], np.int32)
        padded = [
            np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) if missing else x
            for x in rows
        ]
        avals = self.program.avals[2 + len(self.server) :]
        placed = map(from_numpy, padded, avals)
        return self.program.call(
            np.int32(len(numbers)), index, *self.on_device, *placed
        )

    def finish(self, started: Started) -> None:
        good, rows, parts = started.good, started.rows, len(self.work.operations)
        outs = [*map(to_numpy, started.outs)]
        if self.work.on_bad != "keep" and good:
            bad = self.not_finite(good, rows, outs)
            for i in bad:
                self.failed(i, None)
            if bad:
                kept = [k for k, i in enumerate(good) if i not in bad]
                good, rows = [good[k] for k in kept], [x[kept] for x in rows]
                outs = [*map(to_numpy, self.call(good, rows))] if good else []
        low = started.chunk * self.work.chunk
        if self.work.outputs.dtypes:
            size = min(self.work.chunk, self.n - low)
            self.write(started.chunk, size, [i - low for i in good], outs[parts:])
        if good:
            self.count += len(good)
            reduced = _fold.widened(self.work.operations, outs[:parts])
            self.total = (
                reduced
                if self.total is None
                else _fold.combined(self.work.operations, self.total, reduced)
            )

    def write(self, chunk: int, size: int, kept: list[int], outs: Arrays) -> None:
        """Writes placed outputs; rows of elements that are left out are NaN or 0."""
        if len(kept) < size:
            avals = self.program.out_avals[len(self.work.operations) :]
            rows = [_empty(aval) for aval in avals]
            for x, out in zip(rows, outs, strict=False):  # None, if all are bad.
                x[kept] = out[: len(kept)]
            outs = rows
        self.work.outputs.write(chunk, [x[:size] for x in outs])

    def read(self, low: int, high: int) -> tuple[list[int], Arrays]:
        """The rows of all placed inputs, of the elements for which all can be read."""
        skip, groups = {*self.skip}, []
        for rows in self.work.placed:
            if isinstance(rows.reader, Pick):
                (x,) = picked([rows.reader], self.producers)
                numbers = [i for i in range(low, high) if i not in skip]
                x = np.moveaxis(x, rows.leaves[0], 0)[np.array(numbers, int)]
                groups.append((numbers, [x], (0,), rows.inputs))
            else:
                numbers, leaves = read_good(rows.reader, low, high, skip, self.failed)
                skip.update(i for i in range(low, high) if i not in numbers)
                groups.append((numbers, leaves, rows.leaves, rows.inputs))
        good = [i for i in range(low, high) if i not in skip]
        placed: dict[int, np.ndarray] = {}
        for numbers, leaves, taken, inputs in groups:
            if len(numbers) > len(good):
                kept = np.isin(numbers, good)
                leaves = [x[kept] for x in leaves]
            for leaf, k in zip(taken, inputs, strict=True):
                placed[k] = leaves[leaf]
        return good, [placed[k] for k in range(len(placed))]

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
            if error is None:
                advice += ", or with on_bad='keep', which gives what jit gives"
            where = "".join(traceback.format_exception(error)) if error else ""
            raise BadElementError(
                f"beam_runner: element {i} of {self.work.placement!r} is bad: {why}. "
                f"{advice}.\n{where}"
            ) from error
        self.bad.append((i, why))

    def not_finite(self, good: list[int], rows: Arrays, outs: Arrays) -> list[int]:
        """Which of the elements give something that is not finite."""
        parts = len(self.work.operations)
        found = {
            good[k]
            for x in outs[parts:]
            if x.dtype.kind not in "biu"
            for k in np.flatnonzero(~_finite_rows(x[: len(good)]))
        }
        if all(map(_fold.is_finite, self.work.operations, outs[:parts])):
            return sorted(found)
        halves = [(good, rows)]
        while halves:
            numbers, rows = halves.pop()
            if len(numbers) < len(good) or len(good) == 1:
                outs = [*map(to_numpy, self.call(numbers, rows))]
                if all(map(_fold.is_finite, self.work.operations, outs[:parts])):
                    continue
            if len(numbers) == 1:
                found.add(numbers[0])
                continue
            half = len(numbers) // 2
            halves.append((numbers[half:], [x[half:] for x in rows]))
            halves.append((numbers[:half], [x[:half] for x in rows]))
        return sorted(found)


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
