"""The folder of a run: files for readers, and what it needs to go on."""

import os
import sqlite3
from pathlib import Path
from typing import Any

from federated._checkpoint import Checkpoints, digest, types_of
from federated._client_states import ClientStates
from federated._metrics import Files


class Records:
    """The rows of a run's metrics, in a folder with checkpoints, or in memory alone.

    Args:
      folder: None for memory alone.
      settings: what the run was started with, a mapping that JSON can hold.
      state: the algorithm's first state; then that of the last checkpoint.
      first: the first state of a client; None if clients keep nothing.
      resume: false to refuse a folder that has checkpoints.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        settings: dict[str, Any],
        state: Any,
        first: Any,
        resume: bool,
    ):
        self.state, self.rows = state, []
        self.clients: ClientStates | None = None
        self._path = None if folder is None else Path(folder)
        self._checkpoints: Checkpoints | None = None
        self._lock: sqlite3.Connection | None = None
        try:
            self._open(settings, first, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, settings: dict[str, Any], first: Any, resume: bool) -> None:
        path_of_clients = None
        if self._path is not None:
            # What draws at the end: if it is missing, say so before the work.
            from federated import _curves

            self._draw = _curves.plot
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._path)
            path_of_clients = self._path / "clients.sqlite"
            self._files = Files(self._path)
            settings = dict(
                settings,
                state=types_of(self.state),
                kept=types_of(first),
                start=digest([self.state, first]),
            )
            checkpoints = Checkpoints(self._path / "checkpoints", settings)
            self._checkpoints = checkpoints
            if checkpoints.rounds:
                if not resume:
                    raise FileExistsError(
                        f"federated.run: {self._path} has checkpoints of a run. Name "
                        "another folder, or go on with resume=True."
                    )
                self.state, self.rows = checkpoints.restore(self.state)
                if first is not None and not path_of_clients.exists():
                    raise FileNotFoundError(
                        f"federated.run: {path_of_clients} is missing: what clients "
                        "have kept. It belongs to the checkpoints beside it; copy the "
                        "whole folder."
                    )
                self._files.write(self.rows)  # Rows after the checkpoint are cut off.
        if first is not None:
            self.clients = ClientStates(path_of_clients, first)
            self.clients.go_back_to(len(self.rows) - 1)

    def save(self, state: Any) -> None:
        """Writes down all rows so far, and the state after the last one."""
        number = oldest = self.rows[-1]["round"]
        if self._checkpoints is not None:
            self._files.write(self.rows)
            if number not in self._checkpoints.rounds:
                self._checkpoints.save(number, state, self.rows)
            oldest = self._checkpoints.rounds[0]
        if self.clients is not None:
            self.clients.forget_before(oldest)

    def plot(self) -> None:
        """Draws the curves."""
        if self._path is not None:
            self._draw(self.rows, self._path / "curves.png")

    def close(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.close()
        if self.clients is not None:
            self.clients.close()
        if self._lock is not None:
            self._lock.close()


def _locked(folder: Path) -> sqlite3.Connection:
    """A lock on a folder until it is closed, or the process ends, however it does."""
    lock = sqlite3.connect(folder / ".lock", timeout=0, isolation_level=None)
    try:
        lock.execute("begin exclusive")
    except sqlite3.OperationalError as e:
        lock.close()
        raise RuntimeError(
            f"federated.run: another run writes to {folder}. Usually it was started "
            "twice, or an earlier one still goes on: end that, or name another folder."
        ) from e
    return lock
