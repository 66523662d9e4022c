"""What clients keep from round to round, of those seen so far, in a SQLite file.

A state is a row for the round it was written in. Rows of later rounds than a checkpoint
are dropped when a run goes on from there, so a process may end at any moment.
"""

import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_TABLE = """
create table if not exists states (
  client integer, round integer, state blob, primary key (client, round)
) without rowid
"""
_LATEST = "select state from states where client = ? order by round desc limit 1"
# Rows that a later one, of that round or an earlier one, stands for.
_OLD = """
delete from states where exists (
  select 1 from states as later
  where later.client = states.client
    and later.round > states.round and later.round <= ?
)
"""


class ClientStates:
    """States of clients, on disk.

    Args:
      path: of the file; None for a temporary one.
      first: the state of a client that was never seen, a tree of arrays.
    """

    def __init__(self, path: Path | None, first: Any):
        leaves, self._tree = jax.tree.flatten(first)
        if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves):
            raise TypeError(
                "federated.run: client_init gives a PRNG key, which cannot be kept. "
                "Keep jax.random.key_data of it."
            )
        self._first = [np.asarray(x) for x in leaves]
        self._sizes = [x.nbytes for x in self._first]
        # Clients are read by a thread.
        self._lock = threading.Lock()
        self._file = sqlite3.connect(path or "", check_same_thread=False)
        with self._file:
            self._file.execute(_TABLE)

    @property
    def element(self) -> Any:
        """The types of one state."""
        types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self._first]
        return jax.tree.unflatten(self._tree, types)

    def read(self, clients: Iterable[int]) -> Any:
        """The states of some clients, as a tree of arrays `[c, ...]`."""
        rows = [self._row(int(client)) for client in clients]
        stacked = map(np.stack, zip(*rows, strict=True))
        return jax.tree.unflatten(self._tree, stacked)

    def _row(self, client: int) -> list[np.ndarray]:
        with self._lock:
            found = self._file.execute(_LATEST, (client,)).fetchone()
        if found is None:
            return self._first
        (data,) = found
        if len(data) != sum(self._sizes):
            raise ValueError(
                f"federated.run: the state of client {client} has {len(data)} bytes, "
                f"but this algorithm's has {sum(self._sizes)}: the folder is that of "
                "another run."
            )
        arrays, low = [], 0
        for x, size in zip(self._first, self._sizes, strict=True):
            part = np.frombuffer(data, x.dtype, x.size, low)
            arrays.append(part.reshape(x.shape))
            low += size
        return arrays

    def write(self, round: int, clients: np.ndarray, states: Any) -> None:
        """Keeps states `[c, ...]` that clients have after a round."""
        leaves = [np.asarray(x) for x in jax.tree.leaves(states)]
        for x, first in zip(leaves, self._first, strict=True):
            if (x.shape[1:], x.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    "federated.run: the state that a round gives a client has a leaf "
                    f"{x.dtype}{x.shape[1:]}, but client_init gives "
                    f"{first.dtype}{first.shape}: it is to keep its types."
                )
        rows = (
            (int(client), round, b"".join(x[i].tobytes() for x in leaves))
            for i, client in enumerate(clients)
        )
        with self._lock, self._file:
            self._file.executemany(
                "insert or replace into states values (?, ?, ?)", rows
            )

    def go_back_to(self, round: int) -> None:
        """Forgets what was written after a round."""
        with self._lock, self._file:
            self._file.execute("delete from states where round > ?", (round,))

    def forget_before(self, round: int) -> None:
        """Forgets states that a run which goes on at that round, or later, has not."""
        with self._lock, self._file:
            self._file.execute(_OLD, (round,))

    def close(self) -> None:
        self._file.close()
