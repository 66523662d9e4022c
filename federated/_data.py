"""The examples of many clients, which are read as they are asked for."""

import contextlib
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np


class ClientData(Protocol):
    """The examples of many clients, which are read when they are asked for.

    Clients are numbered from 0. All functions here return such data, and take any: a
    class of one's own needs what is listed below, and nothing else.

    Example:
      >>> import federated
      >>> data = federated.from_mapping({"ann": [1.0, 3.0], "bob": [4.0]})
      >>> data
      ClientData: 2 clients, 3 examples, 1 to 2 each; float64[]
      >>> print(data.ids[1], data.num_examples[1], data[1])
      bob 1 [4.]
    """

    @property
    def ids(self) -> Any:
        """The clients' names: an array or another sequence `[clients]`."""
        ...

    @property
    def num_examples(self) -> np.ndarray:
        """How many examples each client has: int64 `[clients]`."""
        ...

    def __len__(self) -> int:
        """The number of clients."""
        ...

    def __getitem__(self, i: int, /) -> Any:
        """One client's examples: a tree of numpy arrays `[examples, ...]`."""
        ...

    def select(self, indices: Any, /) -> "ClientData":
        """The data of some clients, in the order of their indices."""
        ...


class Clients:
    """Clients of which `read` gets the examples; `index` says which of its clients."""

    def __init__(
        self,
        ids: np.ndarray,
        num_examples: np.ndarray,
        read: Callable[[int], Any],
        index: np.ndarray | None = None,
    ):
        self.ids, self.num_examples, self._read = ids, num_examples, read
        self._index = np.arange(len(ids)) if index is None else index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Any:
        i = operator.index(i)
        # Not from the end either: what is asked for by mistake should be an error.
        if not 0 <= i < len(self):
            raise IndexError(
                f"ClientData: there is no client {i}; the data has {len(self)}."
            )
        return self._read(int(self._index[i]))

    def select(self, indices: Any) -> "Clients":
        indices = np.asarray(indices)
        if indices.size == 0:
            indices = indices.astype(np.int64)
        if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
            raise TypeError(
                f"ClientData.select: the indices are {_described(indices)}, not "
                "integers [n]. For a mask, give np.flatnonzero(mask)."
            )
        wrong = indices[(indices < 0) | (indices >= len(self))]
        if wrong.size:
            raise IndexError(
                f"ClientData.select: there is no client {wrong[0]}; the data has "
                f"{len(self)}."
            )
        return Clients(
            self.ids[indices],
            self.num_examples[indices],
            self._read,
            self._index[indices],
        )

    def __repr__(self) -> str:
        counts = self.num_examples
        text = f"ClientData: {len(self):,} clients, {counts.sum():,} examples"
        if not len(self):
            return text
        return f"{text}, {counts.min():,} to {counts.max():,} each; {_types(self[0])}"


#
# From what there is.
#
def from_arrays(tree: Any, ids: Any) -> ClientData:
    """The examples of all clients in common arrays, with the client of each.

    Nothing is read before a client is asked for, and then its rows only: the arrays may
    be files larger than memory, as numpy.memmap opens them, or anything with a `shape`
    that is indexed as numpy arrays are. Rows that lie together are read as a slice, and
    stay in the file until they are used.

    Args:
      tree: a tree of arrays `[examples, ...]`.
      ids: `[examples]`, whose example each is: an array, or anything hashable.

    Returns:
      `ClientData`. Its clients are sorted by their ids; ids that have no order are in
      that of their first examples. A client's examples keep their order.

    Raises:
      ValueError: if there is no example, or sizes differ.

    Example:
      >>> import numpy as np
      >>> import federated
      >>> x = np.arange(10).reshape(5, 2)
      >>> data = federated.from_arrays({"x": x}, ["bob", "ann", "bob", "ann", "ann"])
      >>> data
      ClientData: 2 clients, 5 examples, 2 to 3 each; x: int64[2]
      >>> data[1]["x"]
      array([[0, 1],
             [4, 5]])
    """
    call = "federated.from_arrays"
    tree, examples = sized(call, tree)
    if isinstance(ids, jax.Array):
        ids = np.asarray(ids)
    ids = column(call, "ids", ids, examples)
    if ids.dtype != object:
        names, owners = np.unique(ids, return_inverse=True)
        return dealt(tree, owners, names)
    names = list(dict.fromkeys(ids))
    with contextlib.suppress(TypeError):
        names = sorted(names)
    codes = {name: i for i, name in enumerate(names)}
    owners = np.fromiter(map(codes.__getitem__, ids), np.int64, examples)
    return dealt(tree, owners, objects(names))


def from_mapping(mapping: Mapping[Hashable, Any]) -> ClientData:
    """A mapping from the clients' ids to their examples.

    Each client is read once at first, to count its examples, and then whenever it is
    asked for: the mapping may be one that reads a file. `from_function` does without
    the first reading.

    Args:
      mapping: for each id a tree of arrays `[examples, ...]`, or of lists of numbers.

    Returns:
      `ClientData`, with the clients in the order of the mapping.

    Raises:
      ValueError: if there is no client, or the trees or their types differ.

    Example:
      >>> import federated
      >>> federated.from_mapping({"ann": [1.0, 3.0], "bob": [4.0]})[0]
      array([1., 3.])
    """
    call = "federated.from_mapping"
    ids = objects(list(mapping))
    if not len(ids):
        raise ValueError(f"{call}: the mapping is empty; data needs a client.")

    def read(i: int) -> tuple[Any, int]:
        return sized(f"{call}: client {ids[i]!r}", mapping[ids[i]], least=0)

    counts = np.zeros(len(ids), np.int64)
    types = ""
    for i in range(len(ids)):
        tree, counts[i] = read(i)
        types = types or _types(tree)
        if types != _types(tree):
            raise ValueError(
                f"{call}: the examples of {ids[0]!r} are {types}, but those of "
                f"{ids[i]!r} {_types(tree)}. Give all clients the same tree, with the "
                "same dtypes and shapes after the first axis."
            )
    return Clients(ids, counts, lambda i: jax.tree.map(np.asarray, read(i)[0]))


def from_function(
    ids: int | Sequence[Any] | np.ndarray, num_examples: Any, fn: Callable[[int], Any]
) -> ClientData:
    """Clients that a function makes, or reads, when they are asked for.

    A population of any size takes the memory of its ids and counts.

    Args:
      ids: the names of the clients, or how many there are: then their numbers.
      num_examples: int `[clients]`, how many examples each has.
      fn: `i -> tree` gives the examples of client `i`, arrays `[num_examples[i], ...]`;
        the same ones each time.

    Returns:
      `ClientData`.

    Raises:
      ValueError: if counts are missing or negative; on access, if the examples are not
        as many as was said.

    Example:
      >>> import numpy as np
      >>> import federated
      >>> data = federated.from_function(
      ...     1_000_000, np.full(1_000_000, 3), lambda i: np.arange(i, i + 3)
      ... )
      >>> data[999_999]
      array([ 999999, 1000000, 1000001])
    """
    call = "federated.from_function"
    if isinstance(ids, (int, np.integer)):
        ids = np.arange(positive(call, "the number of clients", ids))
    elif not isinstance(ids, np.ndarray):
        ids = objects(list(ids))
    if not len(ids):
        raise ValueError(f"{call}: there is no id; data needs a client.")
    counts = column(call, "num_examples", np.asarray(num_examples), len(ids), "clients")
    if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError(
            f"{call}: num_examples is {_described(counts)}, the least {counts.min()}; "
            "counts are integers from 0."
        )

    def read(i: int) -> Any:
        tree, examples = sized(f"{call}: client {ids[i]!r}", fn(i), least=0)
        if examples != counts[i]:
            raise ValueError(
                f"{call}: fn({i}) gave {examples} examples, where num_examples[{i}] is "
                f"{counts[i]}. Correct num_examples, or fn."
            )
        return jax.tree.map(np.asarray, tree)

    return Clients(ids, counts.astype(np.int64), read)


def pooled(data: ClientData) -> Any:
    """The examples of all clients together, as for training without federation.

    They are all read, into memory.

    Args:
      data: the data of the clients.

    Returns:
      A tree of numpy arrays `[examples, ...]`, client after client.

    Raises:
      ValueError: if there is no client.

    Example:
      >>> import federated
      >>> federated.pooled(federated.from_mapping({"ann": [1.0, 3.0], "bob": [4.0]}))
      array([1., 3., 4.])
    """
    if not len(data):
        raise ValueError("federated.pooled: there is no client.")
    # Copies, for a source may use its arrays again.
    trees = [jax.tree.map(np.array, data[i]) for i in range(len(data))]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *trees)


#
# What the partitions use too.
#
def dealt(tree: Any, owners: np.ndarray, ids: np.ndarray) -> ClientData:
    """The examples of a tree, of which each belongs to the client `owners` says."""
    counts = np.bincount(owners, minlength=len(ids))
    starts = np.cumsum(counts) - counts
    order = np.argsort(owners, kind="stable")

    def read(i: int) -> Any:
        rows: Any = order[starts[i] : starts[i] + counts[i]]
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
        return jax.tree.map(lambda x: np.asarray(x[rows]), tree)

    return Clients(ids, counts, read)


def sized(call: str, tree: Any, least: int = 1) -> tuple[Any, int]:
    """A tree with arrays as leaves, and how many examples it has."""
    tree = jax.tree.map(_array, tree, is_leaf=_is_numbers)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{call}: the tree of examples has no array.")
    shapes = {jax.tree_util.keystr(path): tuple(x.shape) for path, x in leaves}
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if not shape:
            raise ValueError(
                f"{call}: the examples are the first axis of each leaf, but there "
                f"is a scalar{name and ' at '}{name}."
            )
        if shape[0] != shapes[first][0]:
            raise ValueError(
                f"{call}: every leaf needs the same number of examples, but {first} "
                f"has the shape {shapes[first]}, and {name} {shape}."
            )
    if shapes[first][0] < least:
        raise ValueError(f"{call}: there is no example.")
    return tree, shapes[first][0]


def _is_numbers(x: Any) -> bool:
    """Whether it is a list of numbers, maybe nested: an array, not a tree."""
    return isinstance(x, list) and all(np.isscalar(v) or _is_numbers(v) for v in x)


def _array(x: Any) -> Any:
    lazy = hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, jax.Array)
    # Those of pandas are indexed by label, and not by row.
    return x if lazy and not hasattr(x, "iloc") else np.asarray(x)


def _types(tree: Any) -> str:
    types = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = ", ".join(map(str, x.shape[1:]))
        types.append(f"{name}: " * bool(name) + f"{x.dtype}[{shape}]")
    return ", ".join(types)


def _described(x: np.ndarray) -> str:
    return f"{x.dtype}{[*x.shape]}"


def objects(values: Any) -> np.ndarray:
    """An array of any objects: numpy would take tuples for further axes."""
    return np.fromiter(values, object, len(values))


def column(
    call: str, name: str, values: Any, size: int, axis: str = "examples"
) -> np.ndarray:
    """One value for each example, as an array."""
    if not isinstance(values, np.ndarray):
        values = objects(list(values))
    if values.shape != (size,):
        raise ValueError(
            f"{call}: {name} has the shape {values.shape}, where there are {size} "
            f"{axis}. Give one for each."
        )
    return values


def positive(call: str, name: str, n: int) -> int:
    if operator.index(n) < 1:
        raise ValueError(f"{call}: {name} is {n}; it must be at least 1.")
    return n


def few_enough(call: str, n: int, examples: int, what: str) -> int:
    if positive(call, f"the number of {what}", n) > examples:
        raise ValueError(
            f"{call}: there are {n} {what}, but only {examples} examples, so that some "
            "would get none. Ask for fewer."
        )
    return n


def generator(call: str, key: Any) -> np.random.Generator:
    """Numpy's generator for a key of JAX: the same for the same key and call."""
    data = None
    if hasattr(key, "dtype"):
        data = np.asarray(jax.random.key_data(key))
    if data is None or data.ndim != 1:
        raise TypeError(
            f"{call}: the key is {key!r}; give one of jax.random, as jax.random.key(0)."
        )
    # Without the call, that for jax.random.key(0) would be default_rng(0): whoever has
    # shuffled examples with it would find them dealt out in that very order.
    return np.random.default_rng([*data.tolist(), *call.encode()])
