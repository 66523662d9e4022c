"""The clients of a round, whose examples are read when their turn comes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from federated._batch import Batch, batch_of


class Cohort:
    """Stands for a `Batch`, of which clients are read a few at a time.

    Args:
      data: a `ClientData`.
      clients: int `[n]`, the indices of the clients.
      lengths: those that batches may be padded to, in order; the last has room for all.
      element: any client's examples, for their types.
    """

    def __init__(self, data: Any, clients: Any, lengths: np.ndarray, element: Any):
        self.data, self.element = data, element
        self.clients = np.asarray(clients, np.int32)
        self.counts = np.asarray(data.num_examples)[self.clients].astype(np.int32)
        self.lengths_of = lengths[np.searchsorted(lengths, self.counts)]

    def structs(self, length: int) -> Batch:
        """The types of the batch, padded to a length."""
        n = len(self.clients)

        def padded(x):
            dtype = jax.dtypes.canonicalize_dtype(x.dtype)
            return jax.ShapeDtypeStruct((n, length, *x.shape[1:]), dtype)

        return Batch(
            data=jax.tree.map(padded, self.element),
            mask=jax.ShapeDtypeStruct((n, length), np.bool_),
            count=jax.ShapeDtypeStruct((n,), np.int32),
            client=jax.ShapeDtypeStruct((n,), np.int32),
        )

    def read(self, positions: np.ndarray, length: int) -> Batch:
        """The batch of the clients at some positions."""
        return batch_of(self.data, self.clients[positions], length)


class Row(NamedTuple):
    """One leaf of a placed argument that is read."""

    source: Any
    leaf: int


class States:
    """Stands for the placed states of a cohort's clients, read a few at a time.

    Args:
      element: the types of one client's state.
      n: the number of clients.
      read: from positions to a tree of arrays `[c, ...]`.
    """

    def __init__(self, element: Any, n: int, read: Callable[[np.ndarray], Any]):
        self.element, self.n, self.read_states = element, n, read

    def structs(self, length: int) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.n, *x.shape), x.dtype), self.element
        )

    def read(self, positions: np.ndarray, length: int) -> Any:
        return self.read_states(positions)
