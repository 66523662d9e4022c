"""Placed values, which workers read by index range."""

import dataclasses
import functools
import mmap
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from apache_beam.internal import cloudpickle

from beam_runner import _files


@runtime_checkable
class Source(Protocol):
    """A placed argument whose elements workers read.

    A source is pickled and sent to the workers, so it should hold where data are, and
    not data. Reading the same elements gives the same arrays, or the same array with
    other values: what is read is copied before more is.

    Example:
      >>> import numpy as np
      >>> class Squares:
      ...     num_elements = 1000
      ...
      ...     def read(self, low, high):
      ...         return np.arange(low, high, dtype=np.float32) ** 2
    """

    @property
    def num_elements(self) -> int:
        """How many elements there are."""
        ...

    def read(self, low: int, high: int) -> Any:
        """The elements from the first number up to the second: a tree of `[c, ...]`."""
        ...


def is_source(x: Any) -> bool:
    return isinstance(x, Source) and not isinstance(x, type)


MAX_PICKLED = 2**24


def check_source(source: Any) -> None:
    """Raises what is wrong with a source, before work starts."""
    name = type(source).__name__
    size = len(cloudpickle.dumps(source))
    if size > MAX_PICKLED:
        raise ValueError(
            f"beam_runner: a source of type {name} pickles to {size / 1e6:.0f} MB, "
            "which would be sent to each worker, many times. It should hold where the "
            "data are, as a path, and read them in read(low, high). A class that is "
            "defined in __main__ is pickled with what it reaches there: put it into a "
            "module."
        )


def structs_of(source: Any) -> Any:
    """The types of a source's placed value; its first element tells them."""
    first = jax.tree.map(np.asarray, source.read(0, 1))
    n = int(source.num_elements)

    def struct(x: np.ndarray) -> jax.ShapeDtypeStruct:
        if x.dtype.kind in "OSUMm" or x.shape[:1] != (1,):
            raise TypeError(
                f"beam_runner: {type(source).__name__}.read(0, 1) gives an array "
                f"{x.dtype}{list(x.shape)}. A source gives trees of arrays of numbers, "
                "here [1, ...]: the elements are along axis 0."
            )
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.ShapeDtypeStruct((n, *x.shape[1:]), dtype)

    return jax.tree.map(struct, first)


#
# How a worker reads them: `read(low, high)` gives a list of arrays [high - low, ...].
#
class Reader(Protocol):
    def read(self, low: int, high: int) -> list[np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class SourceReader:
    """A user's source, of which each read is checked."""

    source: Any
    tree: Any  # Of an element, with its types.

    def read(self, low: int, high: int) -> list[np.ndarray]:
        rows = self.source.read(low, high)
        types, tree = jax.tree.flatten(self.tree)
        leaves, got = jax.tree.flatten(rows)
        leaves = [np.asarray(x) for x in leaves]
        shapes = [(high - low, *t.shape[1:]) for t in types]
        if got != tree or [x.shape for x in leaves] != shapes:
            raise SourceError(
                f"beam_runner: {type(self.source).__name__}.read({low}, {high}) gives "
                f"{described(rows)}, but its first element is "
                f"{described(self.tree)}. All elements are of the same shapes, "
                f"and here {high - low} of them are asked for. Pad what is shorter, "
                "and give a mask."
            )
        name = f"{type(self.source).__name__}.read({low}, {high})"
        return [cast(name, x, t.dtype) for x, t in zip(leaves, types, strict=True)]


class SourceError(TypeError):
    """A source does not do what it is to do: no matter of single elements."""


def described(tree: Any) -> str:
    def name(x: Any) -> str:
        dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
        return f"{dtype}{list(np.shape(x))}"

    return str(jax.tree.map(name, tree))


def cast(what: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    """An array in another dtype of its kind, which it must fit into.

    Raises:
      SourceError: if the dtype is of another kind, as an integer one for floats.
      ValueError: if an integer is too large for it.
    """
    if x.dtype == dtype:
        return x
    if not np.can_cast(x.dtype, dtype, "same_kind"):
        raise SourceError(
            f"beam_runner: {what} gives {x.dtype}, which does not go into {dtype}, the "
            "type of the first element, or the one that was said. Convert all of them."
        )
    converted = x.astype(dtype)
    if x.dtype.kind in "iu" and np.any(converted != x):
        raise ValueError(
            f"beam_runner: {what} gives integers that do not fit into {dtype}."
        )
    return converted


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """An array in a file that is mapped into memory, with elements along an axis."""

    path: str
    dtype: Any
    shape: tuple[int, ...]
    offset: int
    order: Literal["C", "F"]
    axis: int
    aval_dtype: Any

    @functools.cached_property
    def array(self) -> np.ndarray:
        return np.memmap(
            self.path, self.dtype, "r", self.offset, self.shape, self.order
        )

    def __reduce__(self) -> Any:
        fields = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return type(self), tuple(fields)

    def read(self, low: int, high: int) -> list[np.ndarray]:
        rows = self.array[(slice(None),) * self.axis + (slice(low, high),)]
        rows = np.ascontiguousarray(np.moveaxis(rows, self.axis, 0))
        return [rows.astype(self.aval_dtype, copy=False)]


@dataclasses.dataclass(frozen=True)
class StagedArray:
    """An array that was staged, with its elements along an axis."""

    array: Any
    axis: int

    def read(self, low: int, high: int) -> list[np.ndarray]:
        x = _files.load(self.array)
        rows = x[(slice(None),) * self.axis + (slice(low, high),)]
        return [np.ascontiguousarray(np.moveaxis(rows, self.axis, 0))]


def reader_of_array(x: Any, axis: int, dtype: Any, folder: str) -> Reader:
    """Reads an array of the host: where it is, if that is a file, or staged."""
    is_file = isinstance(x, np.memmap) and isinstance(x.base, mmap.mmap)
    if is_file and x.filename and x.mode != "c":  # Not one that is changed in memory.
        order = "C" if x.flags.c_contiguous else "F"
        path = str(x.filename)
        return ArrayFile(path, x.dtype, x.shape, x.offset, order, axis, dtype)
    return StagedArray(_files.stage(np.asarray(x, dtype), folder), axis)


@dataclasses.dataclass(frozen=True)
class ChunkFiles:
    """Placed values that were written chunk by chunk: files of some arrays each."""

    folder: str
    chunk: int
    dtypes: tuple[Any, ...]

    def path(self, chunk: int) -> str:
        return _files.join(self.folder, f"chunk-{chunk:08d}")

    def write(self, chunk: int, arrays: Sequence[np.ndarray]) -> None:
        _files.write_arrays(self.path(chunk), arrays)

    def read(self, low: int, high: int) -> list[np.ndarray]:
        first, last = low // self.chunk, -(-high // self.chunk)
        parts = [
            _files.read_arrays(self.path(k), self.dtypes) for k in range(first, last)
        ]
        start = first * self.chunk
        columns = zip(*parts, strict=True)
        return [np.concatenate(x)[low - start : high - start] for x in columns]


@dataclasses.dataclass(frozen=True)
class Whole:
    """All elements of a leaf that a reader reads, along an axis, for the server."""

    reader: Reader
    leaf: int
    n: int
    axis: int

    def value(self) -> np.ndarray:
        return np.moveaxis(self.reader.read(0, self.n)[self.leaf], 0, self.axis)


def read_good(
    reader: Reader,
    low: int,
    high: int,
    wanted: np.ndarray,
    failed: Callable[[int, Exception], None],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Reads what can be read: the elements' positions, and their rows.

    Args:
      reader: what reads them.
      low, high: from where, and up to where.
      wanted: the positions of those that are wanted.
      failed: called with an element that raises, and what it raises.
    """
    try:
        rows = reader.read(low, high)
        is_all = len(wanted) == high - low
        return wanted, rows if is_all else [x[wanted - low] for x in rows]
    except SourceError:
        raise
    except Exception as e:
        error = e
    kept, each = [], []
    for i in wanted.tolist():
        try:
            each.append(reader.read(i, i + 1))
            kept.append(i)
        except Exception as e:
            failed(i, e)
    if len(kept) == high - low:  # Each by itself can be read.
        raise error
    columns = zip(*each, strict=True)
    return np.array(kept, np.int32), [np.concatenate(x) for x in columns]
