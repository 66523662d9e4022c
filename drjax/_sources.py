"""Placed arguments that stay where they are until elements are needed."""

import collections
import functools
import itertools
import operator
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

# Reads the elements from the first number up to the second: arrays `[c, ...]`.
Read = Callable[[int, int], list[np.ndarray]]
_T = TypeVar("_T")
_S = TypeVar("_S")


class Sequence(Protocol):
    """What is read by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


class Elements:
    """Elements that `drjax.streaming` reads as it needs them, for a placed argument.

    Only some chunks of elements are in memory at a time.

    Args:
      source: a sequence, that is anything with `__len__` and `__getitem__`, as a list
        of datasets or a grain source; or an iterable, which gives the elements in
        order. An element is a tree of arrays, of the same types as all the others.
      n: how many there are; needed for an iterable without `len`.

    Raises:
      TypeError: if `source` is neither, or `n` is not known.
      ValueError: if `n` is not `len(source)`.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import drjax
      >>> @drjax.program(clients=1000)
      ... def mean_of_maxima(x):
      ...     return drjax.reduce_mean(drjax.map_fn(jnp.max, x))
      >>> rows = (np.arange(i, i + 5) for i in range(1000))
      >>> print(drjax.streaming(mean_of_maxima)(drjax.Elements(rows, n=1000)))
      503.5
    """

    def __init__(self, source: Sequence | Iterable[Any], n: int | None = None):
        self.source: Any = source
        self.is_indexable = hasattr(source, "__getitem__") and hasattr(
            source, "__len__"
        )
        is_source = self.is_indexable or isinstance(source, Iterable)
        if not is_source or isinstance(source, Mapping | str | bytes):
            raise TypeError(
                "drjax.Elements: a source is a sequence of elements, with __len__ and "
                f"__getitem__, or an iterable, but got {type(source).__name__}. A tree "
                "of arrays [n, ...] is itself a placed argument."
            )
        size = len(self.source) if hasattr(source, "__len__") else None
        self.n: Any = n if size is None else size
        if self.n is None:
            raise TypeError(
                "drjax.Elements: how many elements an iterable of type "
                f"{type(source).__name__} has is not known: say Elements(source, n)."
            )
        if operator.index(self.n) < 1:
            raise ValueError(f"drjax.Elements: there are {self.n} elements, not one.")
        if n not in (None, self.n):
            raise ValueError(f"drjax.Elements: n is {n}, but the source has {size}.")
        self.is_one_shot = not self.is_indexable and iter(self.source) is source
        self._ahead: list[Any] = []  # What was taken from a one-shot source to look.

    @functools.cached_property
    def element(self) -> Any:
        """The first element, with a `jax.ShapeDtypeStruct` for each leaf."""
        try:
            first = self.source[0] if self.is_indexable else next(iter(self.source))
        except (IndexError, StopIteration):
            raise ValueError("drjax.Elements: the source has no element.") from None
        if self.is_one_shot:
            self._ahead.append(first)
        return jax.tree.map(_type_of, first)

    def structs(self) -> Any:
        """The types of the placed value: those of an element with a leading axis."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.n, *x.shape), x.dtype), self.element
        )

    def reader(self) -> Read:
        """Starts to read; an iterable must then be read in order."""
        types, tree = jax.tree.flatten(self.element)
        taken = self._in_order() if not self.is_indexable else None

        def rows(low: int, high: int) -> Iterator[Any]:
            if taken is None:
                return (self.source[i] for i in range(low, high))
            return itertools.islice(taken, high - low)

        def read(low: int, high: int) -> list[np.ndarray]:
            out = [np.empty((high - low, *t.shape), t.dtype) for t in types]
            i = low - 1
            for i, row in enumerate(rows(low, high), low):
                leaves, row_tree = jax.tree.flatten(row)
                got = [(np.shape(x), _type_of(x).dtype) for x in leaves]
                if row_tree != tree or got != [(t.shape, t.dtype) for t in types]:
                    raise ValueError(
                        f"drjax.Elements: element {i} is "
                        f"{jax.tree.map(_type_of, row)}, but the first one is "
                        f"{self.element}. Elements are trees of the same shapes and "
                        "dtypes. Pad what is shorter, and give a mask."
                    )
                for x, leaf in zip(out, leaves, strict=True):
                    x[i - low] = np.asarray(leaf).astype(x.dtype)
            if i + 1 < high:
                raise ValueError(
                    f"drjax.Elements: the source ended after {i + 1} elements, but it "
                    f"is said to have {self.n}."
                )
            if high == self.n and taken is not None:
                _check_exhausted(taken, self.n)
            return out

        return read

    def _in_order(self) -> Iterator[Any]:
        if not self.is_one_shot:
            return iter(self.source)
        ahead, self._ahead = self._ahead, []
        if not ahead:
            raise ValueError(
                "drjax.Elements: the iterator has been read already. Give a sequence, "
                "or an iterable that can be read again."
            )
        return itertools.chain(ahead, self.source)


def _check_exhausted(rows: Iterator[Any], n: int) -> None:
    for _ in rows:
        raise ValueError(
            f"drjax.Elements: the source has more than the {n} elements that it is "
            "said to have."
        )


def _type_of(x: Any) -> jax.ShapeDtypeStruct:
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    if not isinstance(dtype, np.dtype) or dtype.kind in "OSUMm":
        raise TypeError(
            f"drjax.Elements: an element has a leaf of dtype {dtype}. It is to hold "
            "arrays of numbers. Keys can be an array of their own, beside the elements."
        )
    return jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(dtype))


def is_host_array(x: Any) -> bool:
    """Whether this is an array that can be read piece by piece, as a numpy.memmap."""
    if isinstance(x, jax.Array) or getattr(x, "dtype", None) == jax.dtypes.float0:
        return False
    is_array = all(hasattr(x, name) for name in ("shape", "dtype", "__getitem__"))
    return is_array and len(x.shape) > 0


def reader_of_array(x: Any, axis: int) -> Read:
    """Reads rows of an array that has its elements along an axis, to axis 0."""
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)

    def read(low: int, high: int) -> list[np.ndarray]:
        rows = np.asarray(x[(slice(None),) * axis + (slice(low, high),)])
        return [np.array(np.moveaxis(rows, axis, 0), dtype, order="C")]  # A copy.

    return read


def ahead(fn: Callable[[_S], _T], items: Iterable[_S], depth: int) -> Generator[_T]:
    """`map(fn, items)`, where a thread is `depth` items ahead of what is taken."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="drjax-read")
    pending: collections.deque[Any] = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(fn, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # Also if what takes the items fails, or is interrupted.
        pool.shutdown(wait=True, cancel_futures=True)
