"""The real images of a dataset: any image-classification source of `datasets`, or scikit-learn's digits.

Real *training* images are used for init, squeeze, the random-real control and the diversity reference. The *test* split
is only used to score students.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..recipe import NO_IMAGES, DataRecipe
from ..runtime import local_folder, raise_if_stopped
from .classes import choose_classes, find_classes, names_of
from .columns import (
    class_names,
    file_bytes,
    file_sizes,
    find_image_column,
    find_label_column,
    image_cells,
    open_image,
    read_labels,
)
from .open_source import hold_out, image_homes, open_split, source_revision
from .pixels import UNREADABLE, from_pil

_CACHE_BYTES = 2**31
"""A split whose working images fit in this many bytes is decoded once and kept as one uint8 tensor."""


class ImageSplit:
    """The labeled images of one split, resized to squares of `size` pixels with 1 or 3 channels.

    `names` are the class names, by default those of the label column. With `chosen`, only images of these classes are used,
    numbered by their place in it. Image files must be in `homes`, since a table can
    name any file on this machine. `name` is the split name, for errors. See `from_pil` for the other arguments.
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
        names: Sequence[str] | None = None,
        chosen: Sequence[int] | None = None,
        homes: tuple[Path, ...] = (),
        background: str = "white",
        white_level: float | None = None,
    ) -> None:
        labels = read_labels(rows, label_column, names or class_names(rows, label_column), name)
        if chosen is not None:
            kept = np.flatnonzero(np.isin(labels, chosen))
            places = {number: place for place, number in enumerate(chosen)}
            rows, labels = rows.select(kept), np.array([places[label] for label in labels[kept].tolist()], dtype=np.int64)
        self.labels = labels
        self._cells, self._image_column = image_cells(rows, image_column), image_column
        self.columns = (image_column, label_column)
        self.size, self.channels, self.name, self._homes = size, channels, name, homes
        self._convert = partial(from_pil, channels=channels, size=size, background=background, white_level=white_level)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Return working images, (B, C, S, S) uint8.

        Raises:
            DataError: An image cannot be decoded. The message names the row.
        """
        raise_if_stopped()
        if self.fits_in_memory:
            return self._all[torch.as_tensor(np.asarray(indices), dtype=torch.int64)]
        return self._decode(np.asarray(indices))

    @property
    def fits_in_memory(self) -> bool:
        """True if all working images are decoded once and kept."""
        return len(self) * self.channels * self.size**2 <= _CACHE_BYTES

    @cached_property
    def _all(self) -> Tensor:
        return self._decode(np.arange(len(self)))

    def _decode(self, indices: np.ndarray) -> Tensor:
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(self._one, indices.tolist())))

    def _one(self, index: int) -> Tensor:
        cell = self._cells[index][self._image_column]
        try:
            with open_image(cell, self._homes) as picture:
                return self._convert(picture)
        except DataError as error:
            raise DataError(f"{self.where(index)} {error}") from error
        except UNREADABLE as error:
            raise DataError(
                f"{self.where(index)} is not a readable image ({type(error).__name__}); remove or replace it in the source"
            ) from error

    def where(self, index: int) -> str:
        """Return the place of an image for messages: its row and, if it is a file, its path."""
        cell = self._cells[index][self._image_column]
        path = cell.get("path") if isinstance(cell, dict) else None
        return f"row {index} of split {self.name!r}" + (f" ({path})" if path else "")

    @cached_property
    def sample(self) -> np.ndarray:
        """Row numbers of up to 2048 evenly spaced images."""
        return np.unique(np.linspace(0, len(self) - 1, min(len(self), 2048)).astype(np.int64))

    @cached_property
    def file_sizes(self) -> np.ndarray:
        """Size of each encoded image in bytes, (N,) int64; all 0 for arrays of pixels."""
        return file_sizes(self._cells, self._image_column)

    def file(self, index: int) -> bytes:
        """Return the bytes of an encoded image; empty for an array of pixels."""
        return file_bytes(self._cells[index][self._image_column], self._homes)

    @cached_property
    def content(self) -> str:
        """16 hex digits over all labels and up to 2048 evenly spaced images, to detect changed data."""
        digest = hashlib.sha256(self.labels.tobytes())
        for start in range(0, len(self.sample), 256):
            digest.update(self.images(self.sample[start : start + 256]).numpy().tobytes())
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
    part: int | None = None  # number of classes that are distilled, the first ones; `None` for all

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return len(self.class_names)

    @property
    def distilled_classes(self) -> int:
        """The number of classes that are distilled, which are the first ones."""
        return self.num_classes if self.part is None else self.part


def load_source(recipe: DataRecipe) -> SourceData:
    """Open the source, find its columns and check it against the recipe.

    Raises:
        DataError: Not found, no image or label column, or a different number of classes.
    """
    if recipe.source == NO_IMAGES:
        raise DataError("data.source is none, so there are no real images; name test images with --test DATA:SPLIT")
    # A held-out part of the training split replaces the test split, which is then never opened.
    test = None if recipe.validation_fraction else open_split(recipe, recipe.test_split)
    train = open_split(recipe, recipe.train_split)
    image_column = find_image_column(train, recipe)
    label_column = find_label_column(train, recipe, image_column)
    names = class_names(train, label_column, recipe.num_classes if recipe.classes is None else None)
    chosen = None
    if recipe.classes is not None:
        chosen = choose_classes(recipe.classes, names, f"data.source {recipe.source!r}", DataError)
    if recipe.validation_fraction:
        labels = read_labels(train, label_column, names, recipe.train_split)
        train, test = hold_out(train, labels, names, recipe.validation_fraction)
    assert test is not None
    return SourceData(
        train=_checked_split(train, image_column, label_column, names, recipe, recipe.train_split, chosen),
        test=_checked_split(test, image_column, label_column, names, recipe, recipe.test_split, chosen),
        class_names=names if chosen is None else _named(recipe, chosen, names),
        revision=source_revision(train),
        on_hub=recipe.source != "digits" and local_folder(recipe.source) is None,
        part=None if chosen is None else len(chosen),
    )


def _named(recipe: DataRecipe, chosen: Sequence[int], names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the chosen classes and, with all logits, of the others after them.

    Raises:
        DataError: The number of names is not that of the recipe.
    """
    part = set(chosen)
    others = [number for number in range(len(names)) if recipe.class_logits == "full" and number not in part]
    own = names_of([*chosen, *others], names)
    if len(own) != recipe.num_classes:
        raise DataError(f"data.num_classes is {recipe.num_classes}, but there are {len(own)} classes; set it to that")
    return own


def no_images(recipe: DataRecipe, names: Sequence[str]) -> SourceData:
    """Return data without images, for a recipe with `source: none`. `names` are the classes that its teachers know.

    Raises:
        DataError: A class is not one of them, or there are more than the recipe says.
    """
    chosen = tuple(range(len(names)))
    if recipe.classes is not None:
        chosen = choose_classes(recipe.classes, names, "the logit teacher", DataError)
    elif len(names) != recipe.num_classes:
        raise DataError(
            f"data.num_classes is {recipe.num_classes}, but the logit teacher has {len(names)} classes; set data.classes "
            "to distill a part of them"
        )
    own = _named(recipe, chosen, names) if recipe.classes is not None else tuple(names)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(own))})
    rows = datasets.Dataset.from_dict({"image": [], "label": []}, features=features)
    empty = _checked_split(rows, "image", "label", own, recipe, NO_IMAGES)
    return SourceData(train=empty, test=empty, class_names=own, revision=None, part=len(chosen))


def count_classes(recipe: DataRecipe) -> int:
    """Return the number of classes K from the labels of a source. The recipe's `num_classes` is not used."""
    rows = open_split(recipe, recipe.train_split)
    column = find_label_column(rows, recipe, find_image_column(rows, recipe))
    return len(class_names(rows, column))


def _checked_split(
    rows: datasets.Dataset,
    image: str,
    label: str,
    names: Sequence[str],
    recipe: DataRecipe,
    split: str,
    chosen: Sequence[int] | None = None,
) -> ImageSplit:
    """Return a split, checked to have the columns, class order and label range of the training data.

    Only the images of the `chosen` classes are used, if set.
    """
    missing = [column for column in (image, label) if column not in rows.features]
    if missing:
        raise DataError(f"split {split!r} of {recipe.source!r} has no column {missing[0]!r}, which the training split has")
    feature = rows.features[label]
    if isinstance(feature, datasets.ClassLabel) and tuple(feature.names) != tuple(names):
        raise DataError(
            f"split {split!r} of {recipe.source!r} lists its classes in a different order or number than the training data"
            "; both must share one ClassLabel"
        )
    return ImageSplit(
        rows,
        image_column=image,
        label_column=label,
        names=names,
        chosen=chosen,
        size=recipe.size,
        channels=recipe.channels,
        name=split,
        homes=image_homes(recipe.source),
        background=recipe.background,
        white_level=recipe.white_level,
    )


def load_test_split(recipe: DataRecipe, source: str, split: str, names: Sequence[str]) -> ImageSplit:
    """Load another test set, from a Hub id or a folder, at the recipe's working size.

    If it lists other classes or another order, those of `names` are found by WordNet id or name.
    """
    other = replace(recipe, source=source, config=None, revision=None, test_split=split, validation_fraction=0.0)
    rows = open_split(other, split)
    image_column = find_image_column(rows, other)
    label_column = find_label_column(rows, other, image_column)
    feature = rows.features[label_column]
    if isinstance(feature, datasets.ClassLabel) and tuple(feature.names) != tuple(names):
        chosen = find_classes(names, feature.names, f"the test data {source!r}", DataError)
        return _checked_split(rows, image_column, label_column, feature.names, other, split, chosen)
    return _checked_split(rows, image_column, label_column, names, other, split)
