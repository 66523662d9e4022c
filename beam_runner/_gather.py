"""Elements that arrive in a PCollection, written to files of chunks by index."""

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import jax
import numpy as np

from beam_runner._sources import ChunkFiles, cast, described

FILE_BYTES = 2**22  # Of the elements in a file, about.

ADVICE = (
    "Elements of a placed argument arrive as (index, tree), where index is the "
    "position in [0, n), or as beam_runner.Chunks. A PCollection has no order, so the "
    "index must come from the data: read them by a source, as from_parquet gives one, "
    "or keep the number of the record when you make them."
)


class Gather(beam.PTransform):
    """Writes what arrives to files of chunks; gives `[number of elements]`.

    Duplicates and gaps are errors.

    Args:
      what: for messages.
      structs: the types of the placed value, a tree of `[n, ...]`.
      n: how many elements there are; None, as many as arrive.
      files: where they are written.
      are_chunks: whether `(first index, arrays)` arrive, which are chunks, rather than
        `(index, tree)`, which are elements.
    """

    def __init__(
        self,
        what: str,
        structs: Any,
        n: int | None,
        files: ChunkFiles,
        are_chunks: bool,
    ):
        super().__init__()
        self.arguments, self.are_chunks = (what, structs, n, files), are_chunks

    def expand(self, input_or_inputs: Any) -> Any:
        arguments, arriving = self.arguments, input_or_inputs
        if self.are_chunks:
            write = functools.partial(_write_ready, *arguments)
            written = arriving | "Write" >> beam.Map(write)
        else:
            by_chunk = functools.partial(_by_chunk, *arguments)
            write = functools.partial(_write_group, *arguments)
            gathered = arriving | "By chunk" >> beam.Map(by_chunk) | beam.GroupByKey()
            written = gathered | "Write" >> beam.MapTuple(write)
        check = functools.partial(_check_counts, *arguments)
        counts = written | "Count" >> beam.combiners.ToList()
        return counts | "Check" >> beam.Map(check)


def file_size(structs: Any, n: int) -> int:
    """Elements in a file."""
    leaves = jax.tree.leaves(structs)
    each = sum(x.size // max(1, x.shape[0]) * x.dtype.itemsize for x in leaves)
    return max(1, min(n, FILE_BYTES // max(1, each)))


def leaves_of(
    what: str, tree: Any, structs: Any, skip: int, lead: tuple[int, ...]
) -> list[np.ndarray]:
    """The leaves of a tree, checked; their shapes are `lead` and those of the structs.

    Args:
      what: for messages.
      tree: what arrived.
      structs: the types.
      skip: axes of the structs that the leaves lack.
      lead: axes that they have instead.
    """
    types, want = jax.tree.flatten(structs)
    leaves, got = jax.tree.flatten(tree)
    arrays = [np.asarray(x) for x in leaves]
    shapes = [(*lead, *t.shape[skip:]) for t in types]
    if got != want or [x.shape for x in arrays] != shapes:
        expected = jax.tree.unflatten(
            want,
            [
                jax.ShapeDtypeStruct(s, t.dtype)
                for s, t in zip(shapes, types, strict=True)
            ],
        )
        raise TypeError(
            f"beam_runner.MapReduce: {what} is to be {described(expected)}, but is "
            f"{described(tree)}. Pad what is shorter, and give a mask."
        )
    return [cast(what, x, t.dtype) for x, t in zip(arrays, types, strict=True)]


def _by_chunk(
    what: str, structs: Any, n: int | None, files: ChunkFiles, element: Any
) -> tuple[int, Any]:
    """`(index, tree)` to `(chunk, (position in it, leaves))`."""
    index = _index_of(what, element)
    shape = jax.tree.leaves(structs)[0].shape[: len(index)]
    limits = (n, *shape[1:])
    for i, size in zip(index, limits, strict=True):
        if i < 0 or (size is not None and i >= size):
            where = ", ".join(
                "any number of them" if s is None else str(s) for s in limits
            )
            raise ValueError(
                f"beam_runner.MapReduce: an element of {what} has the index "
                f"{element[0]}, but there are {where}."
            )
    leaves = leaves_of(
        f"element {element[0]} of {what}", element[1], structs, len(index), ()
    )
    chunk, row = divmod(index[0], files.chunk)
    return chunk, ((row, *index[1:]), leaves)


def _index_of(what: str, element: Any) -> tuple[int, ...]:
    """The index of an element; one of several numbers where placements are nested."""
    try:
        index, _ = element
        numbers = index if isinstance(index, tuple) else (index,)
        if not isinstance(element, tuple) or not numbers:
            raise TypeError
        return tuple(map(operator.index, numbers))
    except (TypeError, ValueError):
        kind = type(element).__name__
        raise TypeError(
            f"beam_runner.MapReduce: an element of {what} has no index; it is of type "
            f"{kind}. {ADVICE}"
        ) from None


def _write_group(
    what: str,
    structs: Any,
    n: int | None,
    files: ChunkFiles,
    chunk: int,
    group: Any,
) -> tuple[int, int]:
    """Writes a chunk from its elements, in any order; gives how many there were."""
    parts = dict[tuple[int, ...], Any]()
    for place, leaves in group:
        if place in parts:
            index = (chunk * files.chunk + place[0], *place[1:])
            raise ValueError(
                f"beam_runner.MapReduce: two elements of {what} have the index "
                f"{index if len(index) > 1 else index[0]}. Each index comes once."
            )
        parts[place] = leaves
    depth = len(next(iter(parts)))
    low = chunk * files.chunk
    size = files.chunk if n is None else min(files.chunk, n - low)
    rows = 1 + max(place[0] for place in parts) if n is None else size
    inner = jax.tree.leaves(structs)[0].shape[1:depth]
    places = [*np.ndindex(rows, *inner)]
    missing = [place for place in places if place not in parts]
    if len(parts) + len(missing) > len(places):
        raise ValueError(
            f"beam_runner.MapReduce: some elements of {what} have an index of {depth} "
            "numbers, and some of another number of them."
        )
    if missing:
        first = (low + missing[0][0], *missing[0][1:])
        raise ValueError(
            f"beam_runner.MapReduce: no element of {what} has the index "
            f"{first if depth > 1 else first[0]}; {len(missing)} are missing among the "
            f"elements {low} to {low + rows - 1}."
        )
    columns = zip(*(parts[place] for place in places), strict=True)
    stacked = [np.stack(x) for x in columns]
    files.write(chunk, [x.reshape(rows, *inner, *x.shape[1:]) for x in stacked])
    return chunk, rows


def _write_ready(
    what: str, structs: Any, n: int | None, files: ChunkFiles, element: Any
) -> tuple[int, int]:
    """Writes a chunk that the caller has made."""
    (low, *others), tree = _index_of(what, element), element[1]
    leaves = jax.tree.leaves(tree)
    count = np.shape(leaves[0])[0] if leaves and np.ndim(leaves[0]) else 0
    size = files.chunk if n is None else min(files.chunk, n - low)
    if (
        others
        or low % files.chunk
        or not 0 < count <= size
        or (n is not None and count < size)
    ):
        raise ValueError(
            f"beam_runner.MapReduce: a chunk of {what} has {count} elements from index "
            f"{element[0]} on. Chunks of {files.chunk} begin at multiples of that, and "
            "all but the last one are full."
        )
    arrays = leaves_of(f"the chunk at {low} of {what}", tree, structs, 1, (count,))
    files.write(low // files.chunk, arrays)
    return low // files.chunk, count


def _check_counts(
    what: str,
    structs: Any,
    n: int | None,
    files: ChunkFiles,
    counts: Sequence[tuple[int, int]],
) -> list[np.ndarray]:
    """Checks that all chunks are there, each once; gives the number of elements."""
    total = sum(count for _, count in counts)
    expected = total if n is None else n
    chunks = sorted(chunk for chunk, _ in counts)
    there, wanted = {*chunks}, range(-(-expected // files.chunk))
    twice = next(_repeated(chunks), None)
    short = [chunk for chunk, count in sorted(counts)[:-1] if count < files.chunk]
    if short:
        raise ValueError(
            f"beam_runner.MapReduce: elements of {what} are missing among those from "
            f"index {short[0] * files.chunk} to {(short[0] + 1) * files.chunk - 1}."
        )
    lacking = next((chunk for chunk in wanted if chunk not in there), None)
    if twice is not None:
        raise ValueError(
            f"beam_runner.MapReduce: the chunk of {what} from index "
            f"{twice * files.chunk} on came twice."
        )
    if lacking is not None:
        raise ValueError(
            f"beam_runner.MapReduce: {total} elements of {what} have arrived"
            + (f", but the program is for {n}" if n is not None else "")
            + f"; there is none from index {lacking * files.chunk} on. Each index "
            "comes once."
        )
    return [np.array(total, np.int32)]


def _repeated(numbers: Sequence[int]) -> Iterator[int]:
    return (a for a, b in itertools.pairwise(numbers) if a == b)
