"""What a run needs to go on: the algorithm's state and the rows of its metrics."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from drjax._numpy import from_numpy, to_numpy

_KEPT = 2


class Checkpoints:
    """Checkpoints of a run in a folder, by round, written by orbax.

    Args:
      folder: it is made if it is not there.
      settings: what the run was started with, a mapping that JSON can hold.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        import orbax.checkpoint as ocp  # It takes most of a second.

        self._ocp: Any = ocp
        self._settings = settings
        self._manager: Any = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=_KEPT, enable_async_checkpointing=False
            ),
        )

    @property
    def rounds(self) -> list[int]:
        """The rounds that there are checkpoints of."""
        return sorted(self._manager.all_steps())

    def save(self, round: int, state: Any, rows: list[dict[str, Any]]) -> None:
        args = self._ocp.args
        run = {"settings": self._settings, "rows": rows}
        self._manager.save(
            round,
            args=args.Composite(
                state=args.StandardSave(_numbered(state)),
                run=args.JsonSave(run),
            ),
        )

    def restore(self, state: Any) -> tuple[Any, list[dict[str, Any]]]:
        """The newest checkpoint's state, of the types of `state`, and its rows.

        Raises:
          ValueError: if it is that of a run with other settings or other types.
        """
        args, newest = self._ocp.args, self.rounds[-1]
        run = self._manager.restore(
            newest, args=args.Composite(run=args.JsonRestore())
        ).run
        there, here = run["settings"], self._settings
        different = [
            f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
            for name in {**there, **here}
            if there.get(name) != here.get(name)
        ]
        if different:
            raise ValueError(
                "federated.run: the folder holds a run with other settings: "
                f"{'; '.join(different)}. Name another folder, or go on with the same."
            )
        like = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in _numbered(state).items()
        }
        restored = self._manager.restore(
            newest, args=args.Composite(state=args.StandardRestore(like))
        ).state
        leaves, tree = jax.tree.flatten(state)
        leaves = [
            from_numpy(restored[str(i)], x) if str(i) in restored else x
            for i, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(tree, leaves), run["rows"]

    def close(self) -> None:
        self._manager.close()


def types_of(state: Any) -> str:
    """The types of a state's leaves, in words."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return ", ".join(f"{jax.tree_util.keystr(p)} {x.dtype}{x.shape}" for p, x in leaves)


def digest(tree: Any) -> str:
    """A SHA-256 of the leaves of a tree."""
    found = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        found.update(f"{x.dtype}{x.shape}".encode() + to_numpy(x).tobytes())
    return found.hexdigest()


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _numbered(state: Any) -> dict[str, Any]:
    """The leaves by number, keys as their data.

    Orbax saves no empty arrays, and no tree without one that is not.
    """
    leaves = enumerate(jax.tree.leaves(state))
    found = {
        str(i): jax.random.key_data(x) if _is_key(x) else x for i, x in leaves if x.size
    }
    return found or {"none": jnp.zeros(1)}
