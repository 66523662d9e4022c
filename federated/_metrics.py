"""What a run keeps of its rounds: a table as CSV, and TensorBoard's event file.

A row holds what is known of one round, by name: `{"round": 3, "loss": 0.7}`. Both files
are functions of the rows alone, so a run that was interrupted leaves the same bytes.
"""

import csv
import io
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

Row = Mapping[str, float | int]
# How an evaluation names a percentile over clients: "test/accuracy p10".
PERCENTILE = re.compile(r" p(\d+)$")


class Files:
    """Writes rows to `metrics.csv` and `tensorboard/` in a folder.

    In the table, columns are in the order in which names appear, floats can be read
    back exactly, and what a row does not have is empty.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        _tensorboard()  # If it is missing, say so before the work.
        self._table = Path(folder, "metrics.csv")
        # TensorBoard wants "tfevents" in a name; the rest is mostly a time and a host.
        self._events = Path(folder, "tensorboard", "events.out.tfevents.0")
        self._names: list[str] = []
        self._written = 0

    def write(self, rows: Sequence[Row]) -> None:
        """Makes the files those of all rows so far.

        The first call trusts nothing that it finds: files of an earlier process may
        have rows that are in no checkpoint, or end in the middle of one. Later calls
        append the rows that are new, so rows must not change.
        """
        names = names_of(rows[self._written :], self._names)
        if not self._written:
            self._events.parent.mkdir(parents=True, exist_ok=True)
            _set(self._table, _table(rows, names, header=True))
            _set(self._events, _events(rows, header=True))
        else:
            new = rows[self._written :]
            if names == self._names:
                _append(self._table, _table(new, names))
            else:
                _set(self._table, _table(rows, names, header=True))
            _append(self._events, _events(new))
        self._names, self._written = names, len(rows)


def to_columns(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Rows as arrays `[rounds + 1]` by name; NaN where a row does not have it."""
    names = names_of(rows)
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def names_of(rows: Iterable[Row], known: Sequence[str] = ()) -> list[str]:
    """The names in the rows after those known, in the order in which they appear."""
    names = dict.fromkeys(known or ["round"])
    for row in rows:
        names.update(dict.fromkeys(row))
    return [*names]


def _table(rows: Iterable[Row], names: Sequence[str], header: bool = False) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if header:
        writer.writerow(names)
    writer.writerows([row.get(name) for name in names] for row in rows)
    return out.getvalue().encode()


def _events(rows: Iterable[Row], header: bool = False) -> bytes:
    """Rows as TensorBoard's events: a step for each, with a scalar for each name.

    The time of an event is its round. The real one would differ from run to run, and
    the one axis that it serves, relative time, shows rounds in this way.
    """
    event_pb2, summary_pb2, checksum = _tensorboard()
    events = [event_pb2.Event(file_version="brain.Event:2")] if header else []
    for row in rows:
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "round"
        ]
        summary = summary_pb2.Summary(value=values)
        time = step = row["round"]
        events.append(event_pb2.Event(wall_time=time, step=step, summary=summary))
    return b"".join(_record(event.SerializeToString(), checksum) for event in events)


def _record(data: bytes, checksum: Callable[[bytes], int]) -> bytes:
    """A TFRecord. The writer of tensorboardX cannot append to a file."""
    length = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", checksum(x)) for x in (length, data)]
    return length + checksums[0] + data + checksums[1]


def _tensorboard():
    try:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c
    except ImportError as e:
        raise ImportError(
            "federated.run: metrics are written for TensorBoard too, which needs the "
            "package tensorboardX: pip install tensorboardX, or the extra 'federated'."
        ) from e
    return event_pb2, summary_pb2, masked_crc32c


def _set(path: Path, data: bytes) -> None:
    """Makes a file these bytes, at once.

    A file that starts with them is cut: a program that follows it, as TensorBoard does,
    then finds what it knows with more after it, whereas it would keep reading the old
    file if that were replaced.
    """
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    if path.exists() and path.read_bytes().startswith(data):
        os.truncate(path, len(data))
    else:
        new.write_bytes(data)
        os.replace(new, path)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
