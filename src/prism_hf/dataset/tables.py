"""Tables of a distilled dataset, read in place from the Parquet files of a folder or the Hub cache.

No Arrow cache is created. Memory holds one row group and the requested rows.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import DataError
from ..images import reason_of
from ..runtime import SHORT, again, local_folder, stray_link
from .format import IMAGES, VIEWS, image_features

ROWS_AT_ONCE = 4096

_FILES = [f"{IMAGES}/train-*.parquet", f"{VIEWS}/train-*.parquet", "recipe.yaml", "provenance.json"]
"""Files that are downloaded from a Hub dataset."""
_SHARD = re.compile(r"train-\d{5}-of-(\d{5})\.parquet")
_EXPECTED = f"give a folder with {IMAGES}/ and {VIEWS}/, or a Hub id (org/name)"
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, pa.ArrowException)
"""Errors that pyarrow and `datasets` raise for damaged or malicious files."""


@contextmanager
def dataset_folder(source: str | Path, revision: str | None) -> Iterator[Path]:
    """Yield the folder of a dataset; for a Hub id, its snapshot in the Hub cache, with all files from one commit.

    Raises:
        DataError: The source is neither, a link leads out of the folder, or the block raised one; names the dataset.
        HubError: The Hub does not respond, this token cannot access the dataset, or offline the cache lacks a file.
    """
    try:
        folder = local_folder(source) or _downloaded(str(source), revision)
        if folder.is_dir() and (link := stray_link(folder)):  # a repo of another kind may have no file that we download
            raise DataError(f"{str(link)!r} is a link that leads out of {str(folder)!r}; put the files themselves there")
        yield folder
    except DataError as error:
        raise DataError(f"distilled dataset {str(source)!r} cannot be loaded: {error}") from error


def _downloaded(repo_id: str, revision: str | None) -> Path:
    if not is_hub_id(repo_id):
        raise DataError(f"it is neither a folder here nor a Hub id; {_EXPECTED}")

    def download() -> str:
        if not is_offline_mode():  # without a response, the download would silently return an older copy
            HfApi().dataset_info(repo_id, revision=revision)
        return snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=_FILES)

    return Path(again(download, f"asking the Hub for {repo_id!r}", () if is_offline_mode() else SHORT))


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form org/name."""
    return "/" in text and hub_id_problem(text) is None


def hub_id_problem(text: str) -> str | None:
    """Return why a text is not a valid name of a Hub repo, or `None` if it is valid."""
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        return " ".join(str(error).split())
    return None


class RowGroup(NamedTuple):
    """Rows of a table that are compressed together: file, number of the group in it, first row in the table, row count."""

    path: Path
    number: int
    start: int
    rows: int


class Table:
    """A table of a dataset folder, `data` or `views`; only the row groups with the requested rows are read.

    Raises:
        DataError: A shard is missing, unexpected, unreadable, or has other columns than the first one.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.num_rows, self.file_bytes = name, 0, 0
        self.features = datasets.Features()
        self.groups: list[RowGroup] = []  # non-empty groups, in order
        self._paths = _shards(folder, name)
        self._last: tuple[object, pa.Table] = None, None
        for path in self._paths:
            with _opened(path) as file:
                features = datasets.Features.from_arrow_schema(file.schema_arrow)
                sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            if self.features and features != self.features:
                raise DataError(f"{str(path)!r} has other columns or types than the first file; package the dataset again")
            self.features = features
            self.file_bytes += path.stat().st_size
            for number, rows in enumerate(sizes):
                if rows:
                    self.groups.append(RowGroup(path, number, self.num_rows, rows))
                    self.num_rows += rows

    def compressed_bytes(self, columns: Sequence[str]) -> list[int]:
        """Return the compressed bytes of these columns in each row group; call it only for columns that have been read.

        If this metadata is damaged, pyarrow aborts the process here, whereas reading the column first raises an error.
        """
        sizes = []
        for path in self._paths:
            with _opened(path) as file:
                leaves = [i for i in range(len(file.schema)) if file.schema.column(i).path.split(".")[0] in columns]
                groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
                sizes += [sum(group.column(i).total_compressed_size for i in leaves) for group in groups if group.num_rows]
        return sizes

    def check_columns(self, expected: datasets.Features) -> None:
        """Raise a `DataError` if an expected column is missing or has another type; extra columns are allowed."""
        intro = f"it does not have this format: table {self.name!r}"
        if missing := [column for column in expected if column not in self.features]:
            raise DataError(f"{intro} has no column {', '.join(missing)}")
        for column, feature in expected.items():
            if self.features[column] != feature:
                raise DataError(f"{intro} has {self.features[column]} in column {column!r}, expected {feature}")

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Read the rows from `start` up to `stop` or the end of the table; raise a `DataError` if a file is damaged."""
        first = bisect_right(self.groups, start, key=lambda group: group.start) - 1
        parts = []
        for group in self.groups[first:]:
            if group.start >= stop:
                break
            begin = max(0, start - group.start)
            parts.append(self._read_group(group, columns).slice(begin, stop - group.start - begin))
        return pa.concat_tables(parts)

    def _read_group(self, group: RowGroup, columns: Sequence[str]) -> pa.Table:
        """Read a row group; the last one is kept in memory, because the next rows are often in it too."""
        if self._last[0] != (group, columns):
            self._last = None, None  # one at a time in memory
            with _opened(group.path) as file:
                rows = file.read_row_group(group.number, columns=list(columns)).select(list(columns))
            if len(rows) != group.rows:
                counts = f"{len(rows)} rows, but its metadata states {group.rows}"
                raise DataError(f"row group {group.number} of {str(group.path)!r} has {counts}; package it again")
            self._last = (group, columns), rows
        return self._last[1]

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield all rows in batches of `ROWS_AT_ONCE`, independent of the row groups."""
        for start in range(0, self.num_rows, ROWS_AT_ONCE):
            yield self.read(start, start + ROWS_AT_ONCE, columns)


def open_images(folder: Path) -> tuple[Table, tuple[str, ...]]:
    """Open the table of images; return it with the class names, or raise a `DataError` if it has another format."""
    table = Table(folder, IMAGES)
    label = table.features.get("label")
    names = label.names if isinstance(label, datasets.ClassLabel) else []
    table.check_columns(image_features(names))
    return table, tuple(names)


def to_arrays(rows: pa.Table) -> dict[str, np.ndarray]:
    """Convert columns of B numbers or lists to arrays, (B,) or (B, length); raise a `DataError` if a row has no value."""
    arrays = {}
    for name in rows.column_names:
        column = rows[name].combine_chunks()
        is_list = pa.types.is_fixed_size_list(column.type)
        values = column.flatten() if is_list else column
        if column.null_count or values.null_count:
            raise DataError(f"column {name!r} has rows without a value")
        array = values.to_numpy(zero_copy_only=False)
        arrays[name] = array.reshape(len(column), -1) if is_list else array
    return arrays


def _shards(folder: Path, name: str) -> list[Path]:
    """Return all files of a table in order; reject any other `train-*` file, because `datasets` would read it too."""
    paths = sorted((folder / name).glob("train-*"))
    if not paths:
        raise DataError(f"table {name!r} has no file {name}/train-*.parquet; {_EXPECTED}")
    shard = _SHARD.fullmatch(paths[0].name)
    count = int(shard[1]) if shard else len(paths)
    expected = [f"train-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
    names = [path.name for path in paths]
    if unexpected := [each for each in names if each not in expected]:
        raise DataError(f"{name}/ contains {unexpected[0]}, expected train-NNNNN-of-{count:05d}.parquet; move it elsewhere")
    if missing := [each for each in expected if each not in names]:
        suffix = f" and {len(missing) - 3} others" if len(missing) > 3 else ""
        raise DataError(f"{name}/ is missing {', '.join(missing[:3])}{suffix}; package or download the dataset again")
    return paths


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        # With read-ahead, the default, everything read would stay in memory until the file is closed.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            yield file
    except _DAMAGE as error:
        raise DataError(f"{str(path)!r} is not readable as Parquet ({reason_of(error)})") from error
