"""The examples of a cohort, padded: what a round is given."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np


class Batch(NamedTuple):
    """The examples of the clients of a cohort, as a placed value.

    `n` is the number of clients, and `length` that of examples with the padding.

    Args:
      data: a tree of arrays `[n, length, ...]`; padding is zero.
      mask: bool `[n, length]`, true for the examples, which come first.
      count: int32 `[n]`, how many examples a client has.
      client: int32 `[n]`, which client of the data this is. What a client draws should
        depend on it, and not on its place in the cohort.
    """

    data: Any
    mask: Any
    count: Any
    client: Any


def batch_of(data: Any, clients: Any, length: int | None = None) -> Batch:
    """Makes a batch of some clients' examples, for one call of `Algorithm.round`.

    Args:
      data: a `ClientData`.
      clients: int `[n]`, the indices of clients.
      length: how many examples the arrays have room for; by default those of the
        largest of the clients.

    Returns:
      A `Batch` of numpy arrays.

    Raises:
      ValueError: if there is no client, `length` is below 1 or one has more examples,
        or others than `num_examples` or the types of the first client say.

    Example:
      >>> import federated
      >>> data = federated.from_mapping({"ann": [1.0, 3.0], "bob": [4.0]})
      >>> federated.batch_of(data, [1, 0]).data
      array([[4., 0.],
             [1., 3.]], dtype=float32)
    """
    clients = np.asarray(clients)
    if not clients.size:
        raise ValueError("federated.batch_of: there is no client.")
    is_index = clients.ndim == 1 and clients.dtype.kind in "iu"
    if not is_index or clients.min() < 0 or clients.max() >= len(data):
        raise ValueError(
            f"federated.batch_of: clients are indices from 0 to {len(data) - 1}, but "
            f"got {clients}."
        )
    counts = np.asarray(data.num_examples)[clients].astype(np.int32)
    if length is None:
        length = max(1, int(counts.max()))
    elif length < 1:
        raise ValueError(f"federated.batch_of: length is 1 at least, but got {length}.")
    elif counts.max() > length:
        largest = clients[int(counts.argmax())]
        raise ValueError(
            f"federated.batch_of: client {largest} has {counts.max()} examples, more "
            f"than the length {length}."
        )
    first, tree = jax.tree.flatten(data[int(clients[0])])
    types = [(x.shape[1:], x.dtype) for x in map(np.asarray, first)]
    padded = [
        _aligned((len(clients), length, *shape), jax.dtypes.canonicalize_dtype(dtype))
        for shape, dtype in types
    ]
    for i, (client, count) in enumerate(zip(clients, counts, strict=True)):
        leaves, own_tree = jax.tree.flatten(data[int(client)] if i else first)
        leaves = [np.asarray(x) for x in leaves]
        if i and own_tree != tree:
            raise ValueError(
                f"federated.batch_of: the examples of client {client} are a tree "
                f"{own_tree}, but those of client {clients[0]} are {tree}."
            )
        for x, out, (shape, dtype) in zip(leaves, padded, types, strict=True):
            if x.shape != (count, *shape) or x.dtype != dtype:
                raise ValueError(
                    f"federated.batch_of: client {client} has an array "
                    f"{x.dtype}{x.shape}, but {dtype}{(int(count), *shape)} is "
                    "expected, by num_examples and by the others' types. Convert what "
                    "differs, and count the examples that are there."
                )
            out[i, :count] = x  # A copy: a source may use its arrays again.
            out[i, count:] = 0
    mask = np.arange(length) < counts[:, None]
    return Batch(
        jax.tree.unflatten(tree, padded), mask, counts, clients.astype(np.int32)
    )


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A new array, which JAX on CPUs can use where it is: it asks for 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


# More lengths are not worth their compilation once this part of the examples, or less,
# is padding.
_FINE = 0.2


def lengths(num_examples: Any, most: int) -> np.ndarray:
    """The lengths that batches are padded to: at most so many, with little padding.

    A client's batch has the smallest of them that has room for its examples. They are
    the ones with the least padding in all, for each client once: a shortest path, where
    a step from one candidate to the next pads the clients in between. To keep that
    quick, candidates are rounded up to steps of an eighth of their size.
    """
    sizes = np.maximum(np.asarray(num_examples, np.int64), 1)
    step = np.maximum(2 ** np.maximum(np.ceil(np.log2(sizes)).astype(int) - 3, 0), 1)
    rounded = np.minimum(-(-sizes // step) * step, sizes.max())
    ends, owner = np.unique(rounded, return_inverse=True)
    clients = np.concatenate([[0], np.bincount(owner).cumsum()])
    # cost[j]: of the first j candidates' clients, with the last of them as a length.
    cost = np.concatenate([[0.0], np.full(len(ends), np.inf)])
    choices: list[np.ndarray] = []
    for _ in range(min(most, len(ends))):
        steps = cost[:-1, None] + (clients[None, 1:] - clients[:-1, None]) * ends
        steps[np.tril_indices(len(ends), -1)] = np.inf
        choices.append(steps.argmin(0))
        cost = np.concatenate([[np.inf], steps.min(0)])
        if (1 - _FINE) * cost[-1] <= sizes.sum():
            break
    chosen, end = [], len(ends)
    for choice in reversed(choices):
        if not end:
            break
        chosen.append(ends[end - 1])
        end = int(choice[end - 1])
    return np.array(chosen[::-1])
