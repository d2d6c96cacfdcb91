"""The real images of a dataset: any image-classification source of `datasets`, or scikit-learn's digits.

Real *training* images are used for init, squeeze, the random-real control and the diversity reference. The *test* split
is only used to score students.
"""

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError
from ..recipe import DataRecipe
from ..runtime import is_inside, raise_if_stopped
from .open_source import find_column, hold_out, image_homes, local_folder, open_split, source_revision
from .pixels import UNREADABLE, from_pil

_CACHE_BYTES = 2**31
"""A split whose working images fit in this many bytes is decoded once and kept as one uint8 tensor."""


class ImageSplit:
    """The labeled images of one split, resized to squares of `size` pixels with 1 or 3 channels.

    Image files must be in `homes`, since a table can name any file on this machine. `name` is the split name, for errors.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        image_column: str,
        label_column: str,
        size: int,
        channels: int,
        name: str,
        homes: tuple[Path, ...] = (),
    ) -> None:
        self._cells = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self._image_column = image_column
        self.size, self.channels, self.name, self._homes = size, channels, name, homes
        # A missing label is `None` or NaN, whose conversion to an integer would depend on the machine.
        labels = rows.with_format("arrow")[:].column(label_column).fill_null(-1)
        self.labels = labels.to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Return working images, (B, C, S, S) uint8.

        Raises:
            DataError: An image cannot be decoded. The message names the row.
        """
        raise_if_stopped()
        if len(self) * self.channels * self.size**2 <= _CACHE_BYTES:
            return self._all[torch.as_tensor(np.asarray(indices), dtype=torch.int64)]
        return self._decode(np.asarray(indices))

    @cached_property
    def _all(self) -> Tensor:
        return self._decode(np.arange(len(self)))

    def _decode(self, indices: np.ndarray) -> Tensor:
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(self._one, indices.tolist())))

    def _one(self, index: int) -> Tensor:
        cell = self._cells[index][self._image_column]
        if cell and cell["bytes"] is None and cell["path"] and not is_inside(Path(cell["path"]), self._homes):
            raise DataError(
                f"row {index} of split {self.name!r} is the file {cell['path']!r}, which does not belong to the source; "
                "store the images in the source itself"
            )
        try:
            source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
            with Image.open(source) as picture:
                return from_pil(picture, self.channels, size=self.size)
        except (*UNREADABLE, TypeError) as error:
            raise DataError(
                f"row {index} of split {self.name!r} is not a readable image ({type(error).__name__}); "
                "remove or replace it in the source"
            ) from error

    @cached_property
    def content(self) -> str:
        """16 hex digits over all labels and up to 2048 evenly spaced images, to detect changed data."""
        digest = hashlib.sha256(self.labels.tobytes())
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), 2048)).astype(np.int64))
        for start in range(0, len(chosen), 256):
            digest.update(self.images(chosen[start : start + 256]).numpy().tobytes())
        return digest.hexdigest()[:16]

    def rows_by_class(self, num_classes: int) -> list[np.ndarray]:
        """Return the row numbers of each class, in ascending order."""
        return [np.flatnonzero(self.labels == label) for label in range(num_classes)]


@dataclass(frozen=True)
class SourceData:
    """The real data of a recipe. With `validation_fraction`, `test` is the held-out part. `revision` is a commit."""

    train: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    revision: str | None
    on_hub: bool = False

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return len(self.class_names)


def load_source(recipe: DataRecipe) -> SourceData:
    """Open the source, find its columns and check it against the recipe.

    Raises:
        DataError: Not found, no image or label column, or a different number of classes.
    """
    # A held-out part of the training split replaces the test split, which is then never opened.
    test = None if recipe.validation_fraction else open_split(recipe, recipe.test_split)
    train = open_split(recipe, recipe.train_split)
    image_column, label_column = (find_column(train, recipe, key) for key in ("image_column", "label_column"))
    names = _class_names(train, label_column, recipe)
    if recipe.validation_fraction:
        train, test = hold_out(train, label_column, recipe.validation_fraction)
    assert test is not None
    return SourceData(
        train=_checked_split(train, image_column, label_column, names, recipe, recipe.train_split),
        test=_checked_split(test, image_column, label_column, names, recipe, recipe.test_split),
        class_names=names,
        revision=source_revision(train),
        on_hub=recipe.source != "digits" and local_folder(recipe.source) is None,
    )


def count_classes(recipe: DataRecipe) -> int:
    """Return the number of classes K from the labels of a source. The recipe's `num_classes` is not used."""
    rows = open_split(recipe, recipe.train_split)
    column = find_column(rows, recipe, "label_column")
    feature = rows.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        raise DataError(
            f"label column {column!r} of {recipe.source!r} is of type {feature}, which does not define the class count; "
            "make it a ClassLabel (`Dataset.class_encode_column`)"
        )
    return len(feature.names)


def _checked_split(
    rows: datasets.Dataset, image: str, label: str, names: Sequence[str], recipe: DataRecipe, split: str
) -> ImageSplit:
    """Return a split, checked to have the columns, class order and label range of the training data."""
    missing = [column for column in (image, label) if column not in rows.features]
    if missing:
        raise DataError(f"split {split!r} of {recipe.source!r} has no column {missing[0]!r}, which the training split has")
    feature = rows.features[label]
    if isinstance(feature, datasets.ClassLabel) and tuple(feature.names) != tuple(names):
        raise DataError(
            f"split {split!r} of {recipe.source!r} lists its classes in a different order or number than the training data"
            "; both must share one ClassLabel"
        )
    size, channels, homes = recipe.size, recipe.channels, image_homes(recipe.source)
    part = ImageSplit(rows, image_column=image, label_column=label, size=size, channels=channels, name=split, homes=homes)
    wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(names)))
    if len(wrong):
        raise DataError(
            f"row {wrong[0]} of split {split!r} has label {part.labels[wrong[0]]}, expected 0 to {len(names) - 1}; "
            "use a labeled split (unlabeled test splits carry -1)"
        )
    return part


def load_test_split(recipe: DataRecipe, source: str, split: str, class_names: Sequence[str]) -> ImageSplit:
    """Load another test set for the same classes, from a Hub id or a folder, at the recipe's working size."""
    other = replace(recipe, source=source, config=None, revision=None, test_split=split, validation_fraction=0.0)
    rows = open_split(other, split)
    image_column, label_column = (find_column(rows, other, key) for key in ("image_column", "label_column"))
    return _checked_split(rows, image_column, label_column, class_names, other, split)


def _class_names(rows: datasets.Dataset, column: str, recipe: DataRecipe) -> tuple[str, ...]:
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    elif isinstance(feature, datasets.Value) and "int" in feature.dtype:
        names = tuple(str(label) for label in range(recipe.num_classes))
    else:
        raise DataError(
            f"label column {column!r} is of type {feature}; expected ClassLabel or integers "
            "(`Dataset.class_encode_column` turns strings into a ClassLabel)"
        )
    if len(names) != recipe.num_classes:
        raise DataError(f"data.num_classes is {recipe.num_classes}, but column {column!r} has {len(names)} classes")
    return names
