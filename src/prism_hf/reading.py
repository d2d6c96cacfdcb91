"""How a distilled data set is read back, from a folder or the Hub, for students to train on.

Legend: N images, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import httpx2
import numpy as np
import pyarrow as pa
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

from .data import LOAD_ERRORS, local_cache, local_folder, reason_of
from .errors import DataError
from .packaging import VIEWS, image_features, view_features
from .patience import SHORT, again
from .pixels import decode
from .recipe import Recipe
from .recipe_file import load_recipe
from .views import ViewRows, from_columns


@dataclass(frozen=True, eq=False)
class DistilledDataset:
    """A distilled data set in memory; its views are read one epoch at a time.

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


def load_distilled(source: str | Path, *, revision: str | None = None, channels: int | None = None) -> DistilledDataset:
    """Load a data set folder or a Hub data set of our format.

    Args:
        source: Folder, or Hub id.
        revision: Of a Hub data set.
        channels: 1 or 3; by default what the recipe in the folder says, else what the first image has.

    Raises:
        DataError: Not found, or not of this format; one line.

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
    raw = images.cast_column("image", datasets.Image(decode=False))
    encoded: list[bytes] = [(cell or {}).get("bytes") or b"" for cell in raw["image"]]
    if channels is None:
        channels = recipe.data.channels if recipe else _channels(images)
    count = len(images)
    if not count or len(views) % count:
        raise DataError(f"{str(source)!r}: {len(views)} views of {count} images; expected whole epochs")
    blank = [row for row, data in enumerate(encoded) if not data]
    if blank:
        raise DataError(f"row {blank[0]} of {str(source)!r} holds no picture; package or download the data set again")
    image_bytes = sum(map(len, encoded))
    sizes = [images.info.download_size or 0, views.info.download_size or 0]
    return DistilledDataset(
        images_uint8=torch.stack([decode(data, channels) for data in encoded]),
        labels=torch.tensor(images["label"][:]),
        class_names=tuple(images.features["label"].names),
        teacher_logits=torch.from_numpy(_matrix(images.with_format("arrow")[:]["teacher_logits"])),
        num_epochs=len(views) // count,
        epoch=_epoch_reader(views, count),
        image_bytes=image_bytes,
        label_bytes=max(0, sum(sizes) - image_bytes),
        recipe=recipe,
        content=_content(encoded, images, views),
        teacher_weights=_teacher_weights(_shipped(source, "provenance.json", revision)),
    )


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
    strays = set(images["label"]) - set(range(len(label.names)))
    if strays:
        raise DataError(f"{what}: an image has label {strays.pop()}, expected 0 to {len(label.names) - 1}")


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
    if folder is None:
        try:
            validate_repo_id(str(source))
        except HFValidationError as error:
            raise DataError(
                f"distilled data set {str(source)!r} cannot be loaded: it is neither a folder here nor a Hub id; give a "
                "folder with data/, views/ and README.md, or a Hub id"
            ) from error
    try:
        if folder is not None:
            return datasets.load_dataset(str(folder), config, split="train", cache_dir=local_cache(folder))
        return datasets.load_dataset(str(source), config, split="train", revision=revision)
    except datasets.exceptions.NonMatchingSplitsSizesError as error:
        raise DataError(
            f"distilled data set {str(source)!r}, config {config!r}, has another number of rows than its README.md says; "
            "package or download it again"
        ) from error
    except LOAD_ERRORS as error:
        raise DataError(
            f"distilled data set {str(source)!r}, config {config!r}, cannot be loaded ({reason_of(error)}); "
            "give a folder with data/, views/ and README.md, or a Hub id"
        ) from error


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
        return {teacher["name"]: teacher["weights_sha256"] for teacher in teachers}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{str(provenance)!r} cannot be read ({type(error).__name__}); expected what prism-hf packaged, package or "
            "download the data set again"
        ) from error


def _content(encoded: list[bytes], images: datasets.Dataset, views: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for blob in encoded:
        digest.update(hashlib.sha256(blob).digest())
    for table in (images.select_columns(["label", "teacher_logits"]), views):
        for batch in table.with_format("arrow").iter(batch_size=4096):
            for column in batch.columns:
                values = column.combine_chunks()
                values = values.flatten() if pa.types.is_fixed_size_list(values.type) else values
                digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()[:16]


def _channels(images: datasets.Dataset) -> int:
    return 1 if images[0]["image"].mode in ("L", "1", "I;16") else 3


def _epoch_reader(views: datasets.Dataset, count: int) -> Callable[[int], tuple[ViewRows, Tensor]]:
    arrow = views.with_format("arrow")

    def read(epoch: int) -> tuple[ViewRows, Tensor]:
        table: Any = arrow[epoch * count : (epoch + 1) * count]
        columns = {
            name: _matrix(table[name]) if pa.types.is_fixed_size_list(table[name].type) else table[name].to_numpy()
            for name in table.column_names
        }
        return from_columns(columns), torch.from_numpy(columns["teacher_logits"])

    return read


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    width = column.type.list_size
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, width).copy()
