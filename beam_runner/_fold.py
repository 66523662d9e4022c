"""How partial results are folded: in 64 bits, in the order of their index."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np

from beam_runner import _files

Arrays = list[np.ndarray]
FAN_IN = 32
COMBINE = {
    "sum": np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
}


def widened(operations: Sequence[str], arrays: Sequence[np.ndarray]) -> Arrays:
    """Copies of values as they are folded: sums and products in 64 bits."""
    return [
        x.astype(_wide(x.dtype) if operation in ("sum", "prod") else x.dtype)
        for operation, x in zip(operations, arrays, strict=True)
    ]


def _wide(dtype: Any) -> Any:
    if dtype.kind == "b":
        return dtype
    if dtype.kind == "c":
        return np.complex128
    return {"i": np.int64, "u": np.uint64}.get(dtype.kind, np.float64)


def narrowed(dtypes: Sequence[Any], arrays: Sequence[np.ndarray]) -> Arrays:
    with np.errstate(over="ignore"):  # As under jit, a sum may be too large.
        return [x.astype(dtype) for x, dtype in zip(arrays, dtypes, strict=True)]


def add(operations: Sequence[str], total: Arrays, more: Sequence[np.ndarray]) -> None:
    """Combines a total, which is widened and is changed, with more."""
    with np.errstate(over="ignore", invalid="ignore"):
        for operation, x, y in zip(operations, total, more, strict=True):
            COMBINE[operation](x, y, out=x)


def is_finite(operation: str, x: np.ndarray) -> bool:
    """Whether no element can have given a NaN or an infinity to what is reduced.

    Minus infinity is nothing to a maximum, and plus infinity nothing to a minimum:
    programs use them as masks.
    """
    if x.dtype.kind in "biu":
        return True
    if operation == "max":
        return bool(np.all(x < np.inf))
    if operation == "min":
        return bool(np.all(x > -np.inf))
    return bool(np.all(np.isfinite(x)))


class Fold(beam.PTransform):
    """Parts of ranges, `by_group`, to one list of arrays, in a tree by index.

    Args:
      operations, dtypes: how they are combined, and what comes out.
      shapes: of what comes out if there are no ranges; or None, if there are some.
      levels: of the tree, each of which gathers `FAN_IN` to one.
      folder: where large values are staged.
    """

    def __init__(
        self,
        operations: Sequence[str],
        dtypes: Sequence[Any],
        shapes: Any,
        levels: int,
        folder: str,
    ):
        super().__init__()
        self.operations, self.dtypes, self.shapes = operations, dtypes, shapes
        self.levels, self.folder = levels, folder

    def expand(self, input_or_inputs: Any) -> Any:
        partial = input_or_inputs
        if self.levels == 2:
            fold = functools.partial(_folded, self.operations, self.folder)
            gathered = partial | "Gather groups" >> beam.GroupByKey()
            partial = gathered | "Fold groups" >> beam.Map(fold)
        if self.shapes is not None:
            none = partial.pipeline | "None" >> beam.Create([(0, (-1, None))])
            partial = (partial, none) | beam.Flatten()
        finish = functools.partial(
            _finished, self.operations, self.dtypes, self.shapes, self.folder
        )
        return partial | "Gather" >> beam.GroupByKey() | "Fold" >> beam.Map(finish)


def levels(count: int) -> int:
    return 1 if count <= FAN_IN else 2


MAX_RANGES = FAN_IN**2


def by_group(levels: int, index: int, part: Any) -> tuple[int, Any]:
    """A part of the index, with the group in which it is folded first."""
    return index // FAN_IN if levels == 2 else 0, (index, part)


def _folded(operations: Sequence[str], folder: str, group: Any) -> tuple[int, Any]:
    """A group of the first of two levels, as a part of the only one of the second."""
    total = _total(operations, group)
    return 0, (group[0], [_files.stage(x, folder) for x in total])


def _total(operations: Sequence[str], group: Any) -> Any:
    """Combines what is there by order of index; large values are read one at a time."""
    parts = (part for _, part in sorted(group[1], key=lambda indexed: indexed[0]))
    loaded: Iterator[Arrays] = (
        [*map(_files.load, part)] for part in parts if part is not None
    )
    total = None
    for part in loaded:
        if total is None:
            total = [np.array(x) for x in part]
        else:
            add(operations, total, part)
    return total


def _finished(
    operations: Sequence[str],
    dtypes: Sequence[Any],
    shapes: Any,
    folder: str,
    group: Any,
) -> list[Any]:
    total = _total(operations, group)
    if total is None:
        extremes = {"max", "min"} & {*operations}
        if extremes:
            raise ValueError(
                f"beam_runner: reduce_{extremes.pop()} over no elements at all has no "
                "value. Either none arrived, or all of them were bad."
            )
        total = [
            np.full(shape, {"prod": 1, "and": -1}.get(operation, 0)).astype(dtype)
            for operation, dtype, shape in zip(operations, dtypes, shapes, strict=True)
        ]
    arrays = narrowed(dtypes, total)
    return [_files.stage(x, folder) for x in arrays]
