"""Where real images come from: any `datasets` image-classification source, or scikit-learn's digits.

Real *training* images serve init, squeeze, the random-real control and the diversity reference; the *test* part scores
students and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml
from huggingface_hub import constants, is_offline_mode
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..errors import DataError, PrismError
from ..recipe.schema import DataRecipe
from ..runtime.stop import raise_if_stopped
from ..runtime.store import folder_state
from ..runtime.untrusted import ARCHIVES, foreign_files, homes_of, is_inside, is_plain_path, read_header, visible_entries
from .pixels import UNREADABLE, from_pil

_CACHE_BYTES = 2**31
"""Splits whose working images fit in this many bytes are decoded once and kept as one uint8 tensor."""


class ImageSplit:
    """Labelled images of one split at the working size.

    Args:
        rows: A `datasets.Dataset` with the two columns.
        image_column: Name of the Image column.
        label_column: Name of the label column.
        size: Side of the square working image in pixels.
        channels: 1 or 3.
        name: Names the split in errors.
        homes: Places whose files the images may be; a table can name any file of this machine.
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
        self._rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self._image_column = image_column
        self.size, self.channels, self.name, self._homes = size, channels, name, homes
        # A missing label comes as `None` or not-a-number, which would become another number on each machine.
        found = rows.with_format("arrow")[:].column(label_column).fill_null(-1)
        self.labels = found.to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Working images, (B, C, S, S) uint8.

        Raises:
            DataError: An image cannot be decoded; names the row.
            StoppedError: Somebody asked the program to stop.
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
        cell = self._rows[index][self._image_column]
        if cell and cell["bytes"] is None and cell["path"] and not is_inside(Path(cell["path"]), self._homes):
            raise DataError(
                f"row {index} of split {self.name!r} is the file {cell['path']!r}, which does not belong to the source; "
                "store the images themselves in it"
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
        """Sixteen hex digits over all labels and up to 2048 evenly spaced images: whether these are the same data."""
        digest = hashlib.sha256(self.labels.tobytes())
        count = min(len(self), 2048)
        chosen = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        for start in range(0, len(chosen), 256):
            digest.update(self.images(chosen[start : start + 256]).numpy().tobytes())
        return digest.hexdigest()[:16]

    def rows_by_class(self, num_classes: int) -> list[np.ndarray]:
        """Row numbers of each class, ascending."""
        return [np.flatnonzero(self.labels == label) for label in range(num_classes)]


@dataclass(frozen=True)
class SourceData:
    """The real data of a recipe.

    Attributes:
        train: The training split (without what `validation_fraction` holds out).
        test: The test part.
        class_names: Name of each class, K.
        revision: What was resolved for a Hub source, or `None`.
        on_hub: Whether the source is a Hub data set.
    """

    train: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    revision: str | None
    on_hub: bool = False

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)


def load_source(recipe: DataRecipe) -> SourceData:
    """Open the source, find its columns and check it against the recipe.

    Raises:
        DataError: Not found, no image or label column, or another number of classes.
    """
    train, test = _digits() if recipe.source == "digits" else _open(recipe)
    image_column = _find(train, recipe.image_column, datasets.Image, "image_column")
    label_column = _find(train, recipe.label_column, datasets.ClassLabel, "label_column")
    names = _class_names(train, label_column, recipe)
    if recipe.validation_fraction:
        train, test = _hold_out(train, label_column, recipe.validation_fraction)
    assert test is not None
    return SourceData(
        train=_labelled(train, image_column, label_column, names, recipe, recipe.train_split),
        test=_labelled(test, image_column, label_column, names, recipe, recipe.test_split),
        class_names=names,
        revision=_revision(train),
        on_hub=recipe.source != "digits" and local_folder(recipe.source) is None,
    )


def count_classes(recipe: DataRecipe) -> int:
    """K of a source, as its labels say it; `num_classes` of the recipe is not read.

    Raises:
        DataError: Not found, or labels that do not say how many classes there are.
    """
    rows = _digits()[0] if recipe.source == "digits" else _open_split(recipe, recipe.train_split)
    column = _find(rows, recipe.label_column, datasets.ClassLabel, "label_column")
    feature = rows.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        raise DataError(
            f"label column {column!r} of {recipe.source!r} is of type {feature}, which does not say how many classes there "
            "are; make it a ClassLabel (`Dataset.class_encode_column`)"
        )
    return len(feature.names)


def _labelled(
    rows: datasets.Dataset, image: str, label: str, names: Sequence[str], recipe: DataRecipe, split: str
) -> ImageSplit:
    """A split whose columns, class order and labels are those of the training data."""
    missing = [column for column in (image, label) if column not in rows.features]
    if missing:
        raise DataError(f"split {split!r} of {recipe.source!r} has no column {missing[0]!r}, which the training split has")
    feature = rows.features[label]
    if isinstance(feature, datasets.ClassLabel) and tuple(feature.names) != tuple(names):
        raise DataError(
            f"split {split!r} of {recipe.source!r} lists its classes in another order or number than the training data; "
            "both must share one ClassLabel"
        )
    part = ImageSplit(
        rows,
        image_column=image,
        label_column=label,
        size=recipe.size,
        channels=recipe.channels,
        name=split,
        homes=_homes(recipe.source),
    )
    wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(names)))
    if len(wrong):
        raise DataError(
            f"row {wrong[0]} of split {split!r} has label {part.labels[wrong[0]]}, expected 0 to {len(names) - 1}; "
            "use a labelled split (unlabelled test splits carry -1)"
        )
    return part


def load_test_split(recipe: DataRecipe, source: str, split: str, class_names: Sequence[str]) -> ImageSplit:
    """Another test set for the same classes: a Hub id or a folder, at the recipe's working size.

    Raises:
        DataError: Not found, no image or label column, or other classes.
    """
    other = replace(recipe, source=source, config=None, revision=None, test_split=split, validation_fraction=0.0)
    rows = _digits()[1] if (source, split) == ("digits", "test") else _open_split(other, split)
    label_column = _find(rows, recipe.label_column, datasets.ClassLabel, "label_column")
    image_column = _find(rows, recipe.image_column, datasets.Image, "image_column")
    return _labelled(rows, image_column, label_column, class_names, other, split)


def _digits() -> tuple[datasets.Dataset, datasets.Dataset]:
    """scikit-learn's digits, 8 x 8 grey; a fixed stratified quarter is the test part."""
    source = load_digits()
    images = np.rint(source.images * (255 / 16)).astype(np.uint8)
    rows = np.arange(len(images))
    parts = train_test_split(rows, test_size=0.25, stratify=source.target, random_state=0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(n) for n in range(10)])}
    )

    def build(part: np.ndarray) -> datasets.Dataset:
        part = np.sort(part)
        columns = {"image": [Image.fromarray(images[i]) for i in part], "label": source.target[part].tolist()}
        return datasets.Dataset.from_dict(columns, features=features)

    return build(parts[0]), build(parts[1])


def local_folder(source: str | Path) -> Path | None:
    """The folder that a source names, if there is one; what no path can be (too long, no such home) is none."""
    place = os.path.expanduser(source)
    return Path(place) if os.path.isdir(place) else None


def local_cache(folder: Path) -> str:
    """Where `datasets` may cache a local folder in its present state."""
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "prism-hf" / folder_state(folder))


def _open(recipe: DataRecipe) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    # A held-out part of the training split takes the place of the test split, which is then never opened.
    test = None if recipe.validation_fraction else _open_split(recipe, recipe.test_split)
    return _open_split(recipe, recipe.train_split), test


def _open_split(recipe: DataRecipe, name: str) -> datasets.Dataset:
    where = f"data.source {recipe.source!r}" + (f", config {recipe.config!r}" if recipe.config else "")
    folder = local_folder(recipe.source)
    looks_local = recipe.source.startswith((".", "/", "~")) or recipe.source.count("/") != 1
    if looks_local and folder is None:
        raise DataError(
            f"{where} is neither a folder here nor a Hub id (org/name); give `digits`, a Hub id or the path of a folder"
        )
    if folder is not None:
        check_local(folder)
    try:
        if folder is not None and (folder / "state.json").is_file():
            raise DataError(f"{where} was saved as one Dataset without splits; save a DatasetDict with {name!r}")
        if folder is not None and (folder / "dataset_dict.json").is_file():
            _check_saved(folder)
            saved = datasets.load_from_disk(str(folder))
            if name not in saved:
                raise DataError(f"{where} has no split {name!r}, but {', '.join(map(repr, saved))}")
            return saved[name]
        if folder is not None:
            # Absolute: a folder called "text" would pass for the reader of that name, which takes all that lies around.
            return datasets.load_dataset(str(folder.absolute()), recipe.config, split=name, cache_dir=local_cache(folder))
        return datasets.load_dataset(recipe.source, recipe.config, split=name, revision=recipe.revision)
    except PrismError:
        raise
    except Exception as error:  # foreign bytes reach a dozen readers of `datasets` here, each with errors of its own
        raise DataError(f"{where}, split {name!r} cannot be loaded: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """One line on what lies under an error of `datasets`, which wraps a damaged file into words that name nothing."""
    while isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, ConnectionError) and is_offline_mode():
        return f"{text}; HF_HUB_OFFLINE is set, unset it to read from the Hub"
    return text


def _homes(source: str) -> tuple[Path, ...]:
    """Where image files of a source may lie."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return homes_of(folder)
    config = datasets.config
    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
    return tuple(Path(cache).resolve() for cache in (*caches, constants.HF_HUB_CACHE))


def check_local(folder: Path) -> None:
    """Look at a local folder before `datasets` follows what it names.

    Raises:
        DataError: Links, archives or paths that lead out of the folder, or a card that is none.
    """
    homes = homes_of(folder)
    for entry in visible_entries(folder):
        if entry.is_symlink() and not is_inside(Path(entry.path), homes):
            raise DataError(f"{entry.path!r} is a link that leads out of {str(folder)!r}; put the files themselves there")
        if entry.name.lower().endswith(ARCHIVES):
            raise DataError(f"{entry.path!r} is an archive, and none is opened; unpack it, and move it out of the folder")
    card = folder / "README.md"
    try:
        elsewhere = foreign_files(read_header(card.read_text(encoding="utf-8"))) if card.is_file() else []
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{str(card)!r} has no readable header ({' '.join(str(error).split())[:200]})") from error
    if elsewhere:
        raise DataError(f"{str(card)!r} takes data from {elsewhere[0]!r}, which is not below the folder; correct it there")


def _check_saved(folder: Path) -> None:
    """The file names in a folder of `save_to_disk`: the library follows them anywhere."""
    for name in _saved_names(folder):
        if not is_plain_path(name):
            raise DataError(f"{str(folder)!r} takes data from {name!r}, which is not below the folder; save it anew")


def _saved_names(folder: Path) -> Iterator[object]:
    for split in json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]:
        yield split
        state = json.loads((folder / split / "state.json").read_text(encoding="utf-8"))
        yield from (file["filename"] for file in state["_data_files"])


def _find(rows: datasets.Dataset, named: str | None, kind: type, key: str) -> str:
    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in rows.features.items())
    if named is not None:
        if named not in rows.features:
            raise DataError(f"data.{key} is {named!r}, but the columns are {columns}")
        if kind is datasets.Image and not isinstance(rows.features[named], kind):
            raise DataError(f"data.{key} is {named!r}, which is not of type Image; the columns are {columns}")
        return named
    found = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        many = "no" if not found else "more than one"
        raise DataError(f"the data have {many} column of type {kind.__name__}; name it in data.{key}: {columns}")
    return found[0]


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


def _hold_out(rows: datasets.Dataset, column: str, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    labels = np.asarray(rows.with_format("numpy")[column][:])
    try:
        kept, held = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=0)
    except ValueError as error:
        raise DataError(
            f"data.validation_fraction {fraction} cannot be held out of {len(labels)} images: {error}"
        ) from error
    return rows.select(np.sort(kept)), rows.select(np.sort(held))


def _revision(rows: datasets.Dataset) -> str | None:
    """The commit of a Hub source, read from the checksummed files that `datasets` recorded."""
    for url in rows.info.download_checksums or {}:
        if "@" in url:
            return url.rsplit("@", 1)[1].split("/", 1)[0]
    return None
