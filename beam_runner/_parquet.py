"""Parquet files as a source of placed arguments."""

import bisect
import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems


class _File(NamedTuple):
    """A file as it was found: its row groups' sizes, and what tells it from others."""

    path: str
    rows: tuple[int, ...]
    version: tuple[int, float]  # Bytes, and when it was written.


@dataclasses.dataclass(frozen=True)
class ParquetSource:
    """What `from_parquet` returns."""

    columns: tuple[str, ...]
    pad: Mapping[str, int]
    files: tuple[_File, ...]

    @property
    def num_elements(self) -> int:
        return self._groups[1][-1]

    @functools.cached_property
    def _groups(self) -> tuple[list[tuple[_File, int]], list[int]]:
        """The row groups of all files, and at which row each begins and all end."""
        groups = [(file, k) for file in self.files for k in range(len(file.rows))]
        sizes = (file.rows[k] for file, k in groups)
        return groups, [0, *itertools.accumulate(sizes)]

    def __reduce__(self) -> Any:
        return type(self), (self.columns, self.pad, self.files)

    def read(self, low: int, high: int) -> dict[str, np.ndarray]:
        groups, starts = self._groups
        if not 0 <= low < high <= self.num_elements:
            raise IndexError(
                f"beam_runner.from_parquet: read({low}, {high}) of "
                f"{self.num_elements} rows; rows are read from one up to another."
            )
        first = bisect.bisect_right(starts, low) - 1
        parts = []
        for k in range(first, bisect.bisect_left(starts, high)):
            table = _row_group(*groups[k], self.columns)
            begin, end = max(low - starts[k], 0), min(high, starts[k + 1]) - starts[k]
            parts.append(table.slice(begin, end - begin))
        table = pa.concat_tables(parts).combine_chunks()
        arrays: dict[str, np.ndarray] = {}
        for name in self.columns:
            column = pa.concat_arrays(table.column(name).chunks)
            if isinstance(column.type, pa.ListType | pa.LargeListType):
                arrays[name], lengths = _padded(name, column, self.pad[name])
                arrays[f"{name}_length"] = lengths
            else:
                arrays[name] = _array(name, column)
        return arrays


def from_parquet(
    pattern: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    columns: str | Sequence[str],
    pad: int | Mapping[str, int] | None = None,
) -> ParquetSource:
    """Parquet files as a source: an element is a row, a dict of columns.

    Files are in the order of their names, and rows in the order of the files, so that
    an element's index is its row. Workers read the row groups that they need; a worker
    keeps two of them in memory.

    Args:
      pattern: of the names of files, as Beam's FileSystems takes it, or several.
      columns: names of columns of numbers or booleans, or of lists of them. A list of
        fixed size k gives an array [c, k].
      pad: the size to which lists of various lengths are padded, with zeros; of all
        columns, or by column. Such a column has another one, `NAME_length`, int32.

    Returns:
      A source, for `run` and `MapReduce`.

    Raises:
      FileNotFoundError: if no file matches.
      IsADirectoryError: if the pattern is a folder.
      ValueError: if the files lack a column or differ, or `pad` lacks a size. When it
        is read: if a row has no value, or a list is longer than `pad`.
      TypeError: if a column has neither numbers nor booleans.
    """
    is_one = isinstance(pattern, str | os.PathLike)
    patterns = [os.fspath(x) for x in ([pattern] if is_one else pattern)]
    if folder := next(filter(os.path.isdir, patterns), None):
        raise IsADirectoryError(
            f"beam_runner.from_parquet: {folder} is a folder; its files are "
            f"{os.path.join(folder, '*.parquet')}."
        )
    found = {}  # A file is there once, if several patterns match it.
    for one, match in zip(patterns, FileSystems.match(patterns), strict=True):
        if not match.metadata_list:
            raise FileNotFoundError(f"beam_runner.from_parquet: no file matches {one}.")
        found.update((metadata.path, metadata) for metadata in match.metadata_list)
    names = (columns,) if isinstance(columns, str) else tuple(columns)
    files, schemas = [], []
    for _, metadata in sorted(found.items()):
        with _opened(metadata.path) as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            missing = [name for name in names if name not in schema.names]
            if missing:
                raise ValueError(
                    f"beam_runner.from_parquet: {metadata.path} has no column "
                    f"{missing[0]!r}; it has {schema.names}."
                )
            groups = range(parquet.num_row_groups)
            rows = [parquet.metadata.row_group(k).num_rows for k in groups]
        files.append(_File(metadata.path, tuple(rows), _version(metadata)))
        schemas.append([schema.field(name).type for name in names])
        if schemas[-1] != schemas[0]:
            raise ValueError(
                f"beam_runner.from_parquet: the columns {list(names)} of "
                f"{metadata.path} are {[*map(str, schemas[-1])]}, but those of "
                f"{files[0].path} are {[*map(str, schemas[0])]}."
            )
    if not any(map(sum, (file.rows for file in files))):
        raise ValueError(f"beam_runner.from_parquet: the files {pattern} have no rows.")
    sizes = {
        name: _pad_of(name, kind, pad)
        for name, kind in zip(names, schemas[0], strict=True)
        if isinstance(kind, pa.ListType | pa.LargeListType)
    }
    for name, kind in zip(names, schemas[0], strict=True):
        _check_type(name, kind)
    if clash := {f"{name}_length" for name in sizes} & {*names}:
        raise ValueError(
            f"beam_runner.from_parquet: the lengths of a padded column have the name "
            f"{clash.pop()!r}, which another column has."
        )
    return ParquetSource(names, sizes, tuple(files))


def _version(metadata: Any) -> tuple[int, float]:
    return metadata.size_in_bytes, metadata.last_updated_in_seconds or 0.0


def _pad_of(name: str, kind: Any, pad: Any) -> int:
    size = pad.get(name) if isinstance(pad, Mapping) else pad
    if not isinstance(size, int) or size < 1:
        raise ValueError(
            f"beam_runner.from_parquet: the column {name!r} has lists of various "
            f"lengths, {kind}. Say to which size they are padded, as pad={{{name!r}: "
            f"128}}, but got {size!r}."
        )
    return size


def _check_type(name: str, kind: Any) -> None:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    is_list = is_list or pa.types.is_fixed_size_list(kind)
    inner = kind.value_type if is_list else kind
    types = pa.types
    if not any(
        f(inner) for f in (types.is_integer, types.is_floating, types.is_boolean)
    ):
        raise TypeError(
            f"beam_runner.from_parquet: the column {name!r} is {kind}. Programs "
            "compute with numbers and booleans: encode it before, or leave it out."
        )


def _opened(path: str) -> Any:
    kind = CompressionTypes.UNCOMPRESSED  # Parquet compresses by itself.
    return FileSystems.open(path, "application/octet-stream", kind)


@functools.lru_cache(maxsize=2)
def _row_group(file: _File, k: int, columns: tuple[str, ...]) -> pa.Table:
    ((metadata,),) = (match.metadata_list for match in FileSystems.match([file.path]))
    if _version(metadata) != file.version:
        raise OSError(
            f"beam_runner.from_parquet: {file.path} has been written anew since it was "
            "looked at."
        )
    with _opened(file.path) as opened:
        return pq.ParquetFile(opened).read_row_group(k, columns=list(columns))


def _array(name: str, column: Any) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type):
        _check_values(name, column)
        values = _values(name, column)
        return values.reshape(len(column), column.type.list_size)
    return _values(name, column, column)


def _values(name: str, column: Any, values: Any = None) -> np.ndarray:
    values = column.flatten() if values is None else values
    _check_values(name, values)
    return values.to_numpy(zero_copy_only=False)


def _check_values(name: str, values: Any) -> None:
    if values.null_count:
        raise ValueError(
            f"beam_runner.from_parquet: the column {name!r} has {values.null_count} "
            "rows or entries without a value. Fill them before, or leave them out."
        )


def _padded(name: str, column: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists as an array with zeros behind them, and their lengths."""
    _check_values(name, column)
    lengths = np.diff(column.offsets.to_numpy())
    if (longest := lengths.max(initial=0)) > size:
        raise ValueError(
            f"beam_runner.from_parquet: a list of the column {name!r} has {longest} "
            f"entries, and is to be padded to {size}."
        )
    values = _values(name, column)
    array = np.zeros((len(column), size), values.dtype)
    array[np.arange(size) < lengths[:, None]] = values
    return array, lengths.astype(np.int32)
