"""How a distilled data set is read back, from a folder or the Hub, for students to train on.

Memory does not grow with the set: tables are mapped and walked in batches, decoded images and logits lie in a file.

Legend: N images, B rows, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, chain, count
from pathlib import Path
from typing import Any

import datasets
import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from huggingface_hub import HfApi, hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor

from ..errors import DataError
from ..images.open_source import check_local, local_cache, local_folder, reason_of
from ..images.pixels import UNREADABLE, decode
from ..images.views import ViewRows, from_columns
from ..recipe.schema import Recipe
from ..recipe.yaml_file import load_recipe
from ..runtime.hub_client import SHORT, again
from ..runtime.untrusted import is_plain_path
from .format import VIEWS, image_features, view_features

_IN_MEMORY = 2**23
"""Arrays of more bytes than this lie in a file, whose pages the kernel may drop when it needs the memory."""
_PICTURES_AT_ONCE = 32
_ROWS_AT_ONCE = 4096
"""Of the digest `content`, whose value depends on it."""
_SMALL_READS = ds.ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False)
"""The default of Arrow reads ahead, and holds what it has read until the file is closed."""


class ViewTable:
    """The views of a data set, read from their mapped table when asked for.

    Args:
        views: The table.
        count: Images of the set, which is the rows of an epoch.
    """

    def __init__(self, views: datasets.Dataset, count: int) -> None:
        self._arrow, self._count = views.with_format("arrow"), count

    def __call__(self, epoch: int) -> tuple[ViewRows, Tensor]:
        """All views of an epoch, and their raw logits, (N, K) float16."""
        return self.rows(epoch * self._count, (epoch + 1) * self._count)

    def rows(self, start: int, stop: int) -> tuple[ViewRows, Tensor]:
        """The views in the rows from `start` up to `stop` of the table, and their raw logits, (B, K) float16."""
        table: Any = self._arrow[start:stop]
        columns = {
            name: _matrix(table[name]) if pa.types.is_fixed_size_list(table[name].type) else table[name].to_numpy()
            for name in table.column_names
        }
        return from_columns(columns), torch.from_numpy(columns["teacher_logits"])


@dataclass(frozen=True, eq=False)
class DistilledDataset:
    """A distilled data set; what is large in it is mapped from files and read when it is looked at.

    Attributes:
        images_uint8: (N, C, H, W).
        labels: (N,) int64.
        class_names: K.
        teacher_logits: Raw logits of the images themselves, (N, K) float16.
        num_epochs: Epochs of views.
        epoch: Number of an epoch -> its views and their raw logits, (N, K) float16.
        image_bytes: Bytes of the encoded images.
        label_bytes: Bytes of everything else in the two tables' files.
        recipe: The recipe in the folder, or `None`.
        content: Sixteen hex digits over images, labels and all views: whether this is the same data set.
        teacher_weights: SHA-256 of the weights of each teacher, as provenance.json tells.
        footers: Folder of a table ("data", "views") -> the metadata of its Parquet files in order, `None` if they are not
            at hand.
    """

    images_uint8: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    teacher_logits: Tensor
    num_epochs: int
    epoch: Callable[[int], tuple[ViewRows, Tensor]]
    image_bytes: int
    label_bytes: int
    recipe: Recipe | None
    content: str
    teacher_weights: Mapping[str, str] = field(default_factory=dict)
    footers: Callable[[str], Sequence[pq.FileMetaData] | None] = lambda _: None

    def views(self, epoch: int, rows: range) -> tuple[ViewRows, Tensor]:
        """Some views of an epoch and their raw logits, (B, K) float16; no other row is read.

        Args:
            epoch: Number of the epoch.
            rows: Rows of the epoch that follow each other.
        """
        if isinstance(self.epoch, ViewTable):
            first = epoch * len(self.labels)
            return self.epoch.rows(first + rows.start, first + rows.stop)
        views, logits = self.epoch(epoch)
        return views[rows.start : rows.stop], logits[rows.start : rows.stop]

    def label_bytes_of(self, epochs: int | None = None) -> int | None:
        """Bytes, as compressed, of views and logits of the first epochs; `None` if no Parquet files are at hand.

        A row group is read whole, so it counts whole if one of its rows is needed; those that we write end with an epoch.
        Footers and indices of the files are left out.

        Args:
            epochs: How many; `None` for all.
        """
        files = self.footers(VIEWS)
        if files is None:
            return None
        rows = len(self.labels) * (self.num_epochs if epochs is None else epochs)
        groups = [file.row_group(number) for file in files for number in range(file.num_row_groups)]
        starts = accumulate((group.num_rows for group in groups), initial=0)
        return sum(_compressed(group) for group, first in zip(groups, starts, strict=False) if first < rows)

    def image_label_bytes(self) -> int | None:
        """Bytes, as compressed, of the column `teacher_logits` of the images; `None` if no files are at hand."""
        files = self.footers("data")
        if files is None:
            return None
        groups = [file.row_group(number) for file in files for number in range(file.num_row_groups)]
        return sum(_compressed(group, "teacher_logits") for group in groups)


def load_distilled(source: str | Path, *, revision: str | None = None, channels: int | None = None) -> DistilledDataset:
    """Load a data set folder or a Hub data set of our format.

    Args:
        source: Folder, or Hub id.
        revision: Of a Hub data set.
        channels: 1 or 3; by default what the recipe in the folder says, else what the first image has.

    Raises:
        DataError: Not found, not of this format, or no room for the decoded images; one line.

    Example:
        >>> load_distilled("outputs/digits-prism-ipc10/dataset").images_uint8.shape
        torch.Size([100, 1, 32, 32])
    """
    revision = one_commit(source, revision)
    images = open_table(source, "default", revision=revision)
    views = open_table(source, VIEWS, revision=revision)
    _check_columns(source, images, views)
    shipped = _shipped(source, "recipe.yaml", revision)
    recipe = load_recipe(shipped) if shipped else None
    count = len(images)
    if not count or len(views) % count:
        raise DataError(f"{str(source)!r}: {len(views)} views of {count} images; expected whole epochs")
    _check_numbers(source, images, views)
    try:
        content, image_bytes = _content(images, views)
        if channels is None:
            channels = recipe.data.channels if recipe else _channels(images)
        pixels = _kept(_decoded(images, channels), count)
    except DataError as error:
        raise DataError(f"{str(source)!r}: {error}") from error
    except (*UNREADABLE, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{str(source)!r} holds no pictures of one size ({type(error).__name__}: {reason})") from error
    sizes = [images.info.download_size or 0, views.info.download_size or 0]
    return DistilledDataset(
        images_uint8=pixels,
        labels=_kept(_column(images, "label"), count),
        class_names=tuple(images.features["label"].names),
        teacher_logits=_kept(_column(images, "teacher_logits"), count),
        num_epochs=len(views) // count,
        epoch=ViewTable(views, count),
        image_bytes=image_bytes,
        label_bytes=max(0, sum(sizes) - image_bytes),
        recipe=recipe,
        content=content,
        teacher_weights=_teacher_weights(_shipped(source, "provenance.json", revision)),
        footers=lambda table: _footers(source, table, revision),
    )


def _compressed(group: pq.RowGroupMetaData, column: str = "") -> int:
    """Bytes of a row group in its file, or of one of its columns."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    return sum(
        chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column or not column
    )


def _footers(source: str | Path, table: str, revision: str | None) -> list[pq.FileMetaData] | None:
    """Metadata of the Parquet files of a table; those of a Hub data set lie in the cache since it was loaded."""
    folder = local_folder(source)
    if folder is not None:
        names = [f"{table}/{path.name}" for path in sorted((folder / table).glob("train-*.parquet"))]
    else:
        listed = _listed_files(_shipped(source, "provenance.json", revision))
        names = [name for name in listed if name.startswith(f"{table}/train-") and is_plain_path(name)]
    paths = [_shipped(source, name, revision) for name in names]
    found = [path for path in paths if path is not None]
    if not found or len(found) < len(paths):
        return None
    try:
        return [pq.read_metadata(path) for path in found]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{str(source)!r}, {table}: no readable Parquet ({reason_of(error)})") from error


def _check_columns(source: str | Path, images: datasets.Dataset, views: datasets.Dataset) -> None:
    what = f"{str(source)!r} is no distilled data set of this format"
    missing = set(view_features(2)) - set(views.column_names) | (set(image_features(["a", "b"])) - set(images.column_names))
    if missing:
        raise DataError(f"{what}: no column {', '.join(sorted(missing))}")
    label = images.features["label"]
    if not isinstance(label, datasets.ClassLabel):
        raise DataError(f"{what}: label is no ClassLabel")
    for table, expected in ((images, image_features(label.names)), (views, view_features(len(label.names)))):
        for column, feature in expected.items():
            if table.features[column] != feature:
                raise DataError(f"{what}: column {column!r} is {table.features[column]}, expected {feature}")
            if column != "image" and table.data.column(column).null_count:
                raise DataError(f"{what}: column {column!r} has rows without a value")


def _check_numbers(source: str | Path, images: datasets.Dataset, views: datasets.Dataset) -> None:
    """What is used as an index must be one."""
    classes, count = len(images.features["label"].names), len(images)
    bounds = {"label": (images, 0, classes), "image_index": (views, 0, count), "mix_image_index": (views, -1, count)}
    for column, (table, least, end) in bounds.items():
        values = table.with_format("arrow")[:][column]
        found = pc.min_max(values).as_py()
        if values.null_count or found["min"] < least or found["max"] >= end:
            raise DataError(f"{str(source)!r}: column {column} holds other values than {least} to {end - 1}")


def one_commit(source: str | Path, revision: str | None) -> str | None:
    """The commit that a Hub revision is at now: somebody may push between the reading of two tables.

    Folders have none, and offline the cache decides.

    Raises:
        HubError: The Hub does not say.
    """
    if local_folder(source) is not None or is_offline_mode() or str(source).count("/") > 1:
        return revision

    def ask() -> str | None:
        try:
            return HfApi().dataset_info(str(source), revision=revision).sha
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            return revision  # said in words of its own when the tables are opened

    return again(ask, f"asking the Hub for {str(source)!r}", SHORT)


def open_table(source: str | Path, config: str, *, revision: str | None = None) -> datasets.Dataset:
    """One table of a data set folder or a Hub data set of our format, as plain `datasets` opens it.

    Args:
        source: Folder, or Hub id.
        config: "default" (the images) or "views".
        revision: Of a Hub data set.

    Raises:
        DataError: Not found, or no such table; one line.
    """
    folder = local_folder(source)
    if folder is not None:
        check_local(folder)
    else:
        try:
            validate_repo_id(str(source))
        except HFValidationError as error:
            raise DataError(
                f"distilled data set {str(source)!r} cannot be loaded: it is neither a folder here nor a Hub id; give a "
                "folder with data/, views/ and README.md, or a Hub id"
            ) from error
    try:
        return _load(source, folder, config, revision)
    except datasets.exceptions.NonMatchingSplitsSizesError as error:
        raise DataError(
            f"distilled data set {str(source)!r}, config {config!r}, has another number of rows than its README.md says; "
            "package or download it again"
        ) from error
    except Exception as error:  # as in data: foreign bytes reach readers with errors of their own
        raise DataError(
            f"distilled data set {str(source)!r}, config {config!r}, cannot be loaded ({reason_of(error)}); "
            "give a folder with data/, views/ and README.md, or a Hub id"
        ) from error


def _load(source: str | Path, folder: Path | None, config: str, revision: str | None) -> datasets.Dataset:
    small = {"fragment_scan_options": _SMALL_READS}
    if folder is not None:
        place = str(folder.absolute())
        return datasets.load_dataset(place, config, split="train", cache_dir=local_cache(folder), **small)
    if str(source).count("/") != 1:  # the library has readers of its own that are called by one word
        raise DataError("neither a folder nor a Hub id")
    try:
        return datasets.load_dataset(str(source), config, split="train", revision=revision, **small)
    except ValueError:
        if not is_offline_mode():
            raise
        # Options are part of a table's name in the cache; another program has perhaps loaded it without.
        return datasets.load_dataset(str(source), config, split="train", revision=revision)


def _shipped(source: str | Path, name: str, revision: str | None) -> Path | None:
    """A file beside the tables, fetched if the data set is on the Hub; `None` if it has no such file."""
    folder = local_folder(source)
    if folder is not None:
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(str(source), name, repo_type="dataset", revision=revision))
    except LocalEntryNotFoundError as error:  # no answer is not the answer that there is no such file
        raise DataError(f"{name} of {str(source)!r} cannot be fetched: {type(error).__name__}") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise DataError(f"{name} of {str(source)!r} cannot be fetched: {type(error).__name__}") from error


def _teacher_weights(provenance: Path | None) -> dict[str, str]:
    if provenance is None:
        return {}
    try:
        teachers = json.loads(provenance.read_text(encoding="utf-8"))["teachers"]
        return {str(teacher["name"]): str(teacher["weights_sha256"]) for teacher in teachers}
    except _NO_PROVENANCE as error:
        raise _unreadable(provenance, error) from error


def _listed_files(provenance: Path | None) -> list[str]:
    """Names of the files that provenance.json vouches for, sorted."""
    if provenance is None:
        return []
    try:
        return sorted(str(name) for name in json.loads(provenance.read_text(encoding="utf-8"))["files"])
    except _NO_PROVENANCE as error:
        raise _unreadable(provenance, error) from error


_NO_PROVENANCE = (OSError, ValueError, LookupError, TypeError, RecursionError)


def _unreadable(provenance: Path, error: Exception) -> DataError:
    return DataError(
        f"{str(provenance)!r} cannot be read ({type(error).__name__}); expected what prism-hf packaged, package or "
        "download the data set again"
    )


def _content(images: datasets.Dataset, views: datasets.Dataset) -> tuple[str, int]:
    """Digest of the set, and the bytes of its encoded images."""
    digest, size = hashlib.sha256(), 0
    for blob in chain.from_iterable(_encoded(images)):
        digest.update(hashlib.sha256(blob).digest())
        size += len(blob)
    for table in (images.select_columns(["label", "teacher_logits"]), views):
        for batch in table.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
            for chunk in chain.from_iterable(column.chunks for column in batch.columns):
                values = _values(chunk)
                digest.update(values.tobytes() if values.dtype == object else values.data)
    return digest.hexdigest()[:16], size


def _encoded(images: datasets.Dataset) -> Iterator[list[bytes]]:
    raw = images.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    for first, batch in zip(count(0, _PICTURES_AT_ONCE), raw.iter(batch_size=_PICTURES_AT_ONCE), strict=False):
        blobs = [(cell or {}).get("bytes") or b"" for cell in batch["image"]]
        if b"" in blobs:
            raise DataError(f"row {first + blobs.index(b'')} holds no picture; package or download the data set again")
        yield blobs


def _decoded(images: datasets.Dataset, channels: int) -> Iterator[np.ndarray]:
    """All images, a few at once, each (B, C, H, W) uint8."""
    shape = None
    with ThreadPoolExecutor() as pool:
        for blobs in _encoded(images):
            pictures = list(pool.map(decode, blobs, [channels] * len(blobs)))
            shape = shape or pictures[0].shape
            if strange := [picture.shape for picture in pictures if picture.shape != shape]:
                raise DataError(f"has images of {tuple(shape)} and of {tuple(strange[0])}; expected one size")
            yield torch.stack(pictures).numpy()


def _column(table: datasets.Dataset, name: str) -> Iterator[np.ndarray]:
    """A column a few rows at once, each (B,) or (B, K)."""
    for batch in table.select_columns([name]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for chunk in batch[name].chunks:
            yield _values(chunk).reshape(len(chunk), -1) if pa.types.is_fixed_size_list(chunk.type) else _values(chunk)


def _kept(parts: Iterable[np.ndarray], count: int) -> Tensor:
    """Parts of `count` rows in all, as one tensor: in memory if it is small, else in a nameless file.

    The file lies where `datasets` caches: /tmp may be memory. It has no name, so that nothing is left behind by a process
    that is killed, and it is written before it is mapped: a full disk is an error, where a map would be a crash.
    """
    source = iter(parts)
    first = next(source)
    shape, folder = (count, *first.shape[1:]), Path(datasets.config.HF_DATASETS_CACHE)
    size = math.prod(shape) * first.itemsize
    if size <= _IN_MEMORY:
        return torch.from_numpy(np.concatenate([first, *source]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for part in chain([first], source):
                file.write(np.ascontiguousarray(part).data)
            file.flush()
            os.fsync(file.fileno())  # a network disk says only now that it is full
            return torch.from_numpy(np.memmap(file, first.dtype, "r+", shape=shape))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{folder} cannot hold the {size / 1e6:.0f} MB of the decoded data set ({reason}); "
            "free some room, or set HF_DATASETS_CACHE to a folder on another disk"
        ) from error


def _channels(images: datasets.Dataset) -> int:
    return 1 if images[0]["image"].mode in ("L", "1", "I;16") else 3


def _values(array: pa.Array) -> np.ndarray:
    """The values of an array, those of a list column flat; not copied where Arrow can do without."""
    flat = array.flatten() if pa.types.is_fixed_size_list(array.type) else array
    return flat.to_numpy(zero_copy_only=False)


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    return np.concatenate([_values(chunk) for chunk in column.chunks]).reshape(-1, column.type.list_size)
