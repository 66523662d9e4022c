"""Arrays in files, under a folder that all workers reach through Beam's FileSystems.

A file is written under a temporary name and renamed, so that it is whole or absent, and
that a repeated piece of work does no harm.
"""

import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems

LARGE = 2**18  # Bytes of an array that is staged as a file, rather than sent.

join = FileSystems.join


def is_local(path: str) -> bool:
    return FileSystems.get_scheme(path) is None


def new_folder(root: str) -> str:
    folder = join(root, f"drjax-{uuid.uuid4().hex}")
    make_folder(folder)
    return folder


def make_folder(path: str) -> None:
    FileSystems.mkdirs(path)


def remove(folder: str) -> None:
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        FileSystems.delete([folder])


def write(path: str, write_to: Callable[[Any], None]) -> None:
    """Writes a file by a function of an open one; replaces one that is there."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    with FileSystems.create(temporary, "application/octet-stream") as file:
        write_to(file)
    try:
        FileSystems.rename([temporary], [path])
    except BeamIOError:  # Some file systems do not replace a file.
        if not FileSystems.exists(path):
            raise
        FileSystems.delete([path])
        FileSystems.rename([temporary], [path])


def write_arrays(path: str, arrays: Sequence[np.ndarray]) -> None:
    """Writes arrays in NumPy's format, one after the other."""

    def write_to(file: Any) -> None:
        for x in arrays:
            np.lib.format.write_array(file, plain(x), allow_pickle=False)

    write(path, write_to)


def read_arrays(path: str, dtypes: Sequence[Any]) -> list[np.ndarray]:
    with FileSystems.open(path) as file:
        data = io.BytesIO(file.read())
    return [
        np.lib.format.read_array(data, allow_pickle=False).view(dtype)
        for dtype in dtypes
    ]


def write_json(path: str, value: Any) -> None:
    write(path, lambda file: file.write(json.dumps(value).encode()))


def read_json(path: str) -> Any:
    with FileSystems.open(path) as file:
        return json.loads(file.read())


def plain(x: np.ndarray) -> np.ndarray:
    """An array of a dtype that NumPy's format knows: bytes stand for bfloat16."""
    x = np.ascontiguousarray(x).reshape(np.shape(x))
    return x if x.dtype.kind in "biufc" else x.view(f"u{x.dtype.itemsize}")


#
# Large values, which are staged once: in files that are named by their content.
#
class Staged(NamedTuple):
    """A large array in a file, by the SHA-256 of its data."""

    path: str
    digest: str
    dtype: Any


def stage(x: np.ndarray, folder: str) -> np.ndarray | Staged:
    """An array as it is sent: itself, or, if it is large, where it is."""
    if x.nbytes < LARGE:
        return x
    x = np.ascontiguousarray(x)
    digest = _digest(x)
    path = join(folder, f"{digest}.npy")
    if not FileSystems.exists(path):
        write_arrays(path, [x])
    _checked.add(digest)  # By this process, which has just computed it.
    return Staged(path, digest, x.dtype)


_checked: set[str] = set()
_lock = threading.Lock()


def load(x: np.ndarray | Staged) -> np.ndarray:
    """An array that `stage` has given: mapped into memory, checked once a process.

    Raises:
      ValueError: if the file does not hold what was written.
    """
    if not isinstance(x, Staged):
        return x
    with _lock:
        path = x.path if is_local(x.path) else _fetched(x.path)
        array = np.load(path, mmap_mode="r", allow_pickle=False).view(x.dtype)
        if x.digest not in _checked:
            if _digest(array) != x.digest:
                raise ValueError(
                    f"beam_runner: {x.path} is damaged: its data have another SHA-256 "
                    "than when they were written."
                )
            _checked.add(x.digest)
    return array


def _digest(x: np.ndarray) -> str:
    """The SHA-256 of an array: of its type and its data."""
    digest = hashlib.sha256(f"{x.dtype}{x.shape}".encode())
    digest.update(plain(x).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@functools.cache
def _fetched(path: str) -> str:
    """A copy of a remote file on this machine, until the process ends."""
    local = os.path.join(_local_folder().name, uuid.uuid4().hex)
    with FileSystems.open(path) as source, open(local, "wb") as target:
        shutil.copyfileobj(source, target, 2**22)
    return local


@functools.cache
def _local_folder() -> Any:
    return tempfile.TemporaryDirectory(prefix="drjax-")
