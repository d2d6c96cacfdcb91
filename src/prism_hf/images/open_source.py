"""The rows of a source: open its splits without following links and paths out of it, and find their columns."""

import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import constants, is_offline_mode
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ..errors import DataError, PrismError
from ..recipe import DataRecipe
from ..runtime import (
    folder_state,
    foreign_files,
    homes_of,
    is_inside,
    is_plain_path,
    read_card,
    read_json,
    visible_entries,
)

_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".tbz2", ".xz", ".txz", ".7z", ".rar", ".zst", ".lz4")


def open_split(recipe: DataRecipe, name: str) -> datasets.Dataset:
    """Open one split of the digits, of a local folder, or of a dataset on the Hub.

    Raises:
        DataError: The source or the split is missing, unreadable, or leads out of its folder.
    """
    if recipe.source == "digits":
        return _open_digits(name)
    what = f"data.source {recipe.source!r}" + (f", config {recipe.config!r}" if recipe.config else "")
    folder = local_folder(recipe.source)
    if folder is not None:
        _check_local(folder)
    elif recipe.source.startswith((".", "/", "~")) or recipe.source.count("/") != 1:
        raise DataError(
            f"{what} is neither a folder here nor a Hub id (org/name); give `digits`, a Hub id or the path of a folder"
        )
    try:
        if folder is None:
            return datasets.load_dataset(recipe.source, recipe.config, split=name, revision=recipe.revision)
        if (folder / "state.json").is_file():
            raise DataError(f"{what} was saved as one Dataset without splits; save a DatasetDict with {name!r}")
        if (folder / "dataset_dict.json").is_file():
            return _open_saved(folder, name, what)
        # `datasets` keys its cache by the card of a folder alone, so this cache path depends on the state of all files.
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "prism-hf" / folder_state(folder)
        # Absolute, since `datasets` takes a folder called "text" for its reader of that name, which reads all files around.
        return datasets.load_dataset(str(folder.absolute()), recipe.config, split=name, cache_dir=str(cache))
    except PrismError:
        raise
    except Exception as error:  # untrusted bytes reach a dozen readers of `datasets`, each with its own errors
        raise DataError(f"{what}, split {name!r} cannot be loaded: {reason_of(error)}") from error


def _open_digits(name: str) -> datasets.Dataset:
    """Return a split of scikit-learn's digits, 8 x 8 gray. The test split is a fixed stratified quarter."""
    source = load_digits()
    images = np.rint(source.images * (255 / 16)).astype(np.uint8)
    columns = {"image": [Image.fromarray(image) for image in images], "label": source.target.tolist()}
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    train, test = hold_out(datasets.Dataset.from_dict(columns, features=features), "label", 0.25)
    splits = {"train": train, "test": test}
    if name not in splits:
        raise DataError(f"data.source 'digits' has no split {name!r}; its splits are 'train', 'test'")
    return splits[name]


def _open_saved(folder: Path, name: str, what: str) -> datasets.Dataset:
    """Open a split of a folder made by `save_to_disk`."""
    for file in _saved_names(folder):
        if not is_plain_path(file):  # the library would follow it anywhere
            raise DataError(f"{str(folder)!r} takes data from {file!r}, which is not below the folder; save it again")
    saved = datasets.load_from_disk(str(folder))
    if name not in saved:
        raise DataError(f"{what} has no split {name!r}; its splits are {', '.join(map(repr, saved))}")
    return saved[name]


def _saved_names(folder: Path) -> Iterator[object]:
    for split in read_json(folder / "dataset_dict.json")["splits"]:
        yield split
        state = read_json(folder / split / "state.json")
        yield from (file["filename"] for file in state["_data_files"])


def find_column(rows: datasets.Dataset, recipe: DataRecipe, key: str) -> str:
    """Return the column that a recipe key (`image_column` or `label_column`) names, or else the only one of its type."""
    named, kind = getattr(recipe, key), datasets.Image if key == "image_column" else datasets.ClassLabel
    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in rows.features.items())
    if named is None:
        of_type = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
        if len(of_type) == 1:
            return of_type[0]
        many = "more than one" if of_type else "no"
        raise DataError(f"the data has {many} column of type {kind.__name__}; set data.{key} to one of {columns}")
    if named not in rows.features:
        raise DataError(f"data.{key} is {named!r}, but the columns are {columns}")
    if kind is datasets.Image and not isinstance(rows.features[named], kind):
        raise DataError(f"data.{key} is {named!r}, which is not of type Image; the columns are {columns}")
    return named


def hold_out(rows: datasets.Dataset, column: str, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split training rows into those to keep and a stratified fraction to hold out."""
    labels = np.asarray(rows.with_format("numpy")[column][:])
    try:
        kept, held = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=0)
    except ValueError as error:
        raise DataError(
            f"data.validation_fraction {fraction} cannot be held out of {len(labels)} images: {error}"
        ) from error
    return rows.select(np.sort(kept)), rows.select(np.sort(held))


def local_folder(source: str | Path) -> Path | None:
    """Return the folder that a source names, or `None` if there is none or it cannot be a path (too long, no such home)."""
    path = os.path.expanduser(source)
    return Path(path) if os.path.isdir(path) else None


def image_homes(source: str) -> tuple[Path, ...]:
    """Return the folders that may contain the image files of a source."""
    folder = local_folder(source)
    if folder is not None:
        return homes_of(folder)
    config = datasets.config
    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
    return tuple(Path(cache).resolve() for cache in (*caches, constants.HF_HUB_CACHE))


def _check_local(folder: Path) -> None:
    """Refuse archives, and links and card paths that lead out of a local folder: `datasets` follows all of them."""
    homes = homes_of(folder)
    for entry in visible_entries(folder):
        if entry.is_symlink() and not is_inside(Path(entry.path), homes):
            raise DataError(f"{entry.path!r} is a link that leads out of {str(folder)!r}; put the files themselves there")
        if entry.name.lower().endswith(_ARCHIVES):
            raise DataError(f"{entry.path!r} is an archive, which is not read; unpack it, and move it out of the folder")
    _check_card(folder / datasets.config.REPOCARD_FILENAME, "{}")
    _check_card(folder / datasets.config.REPOYAML_FILENAME, "---\n{}\n---\n")  # a header in a separate file


def _check_card(path: Path, template: str) -> None:
    if not path.is_file():
        return
    try:
        foreign = foreign_files(read_card(template.format(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: a list that contains itself
        raise DataError(f"{str(path)!r} has no readable header ({' '.join(str(error).split())[:200]})") from error
    if foreign:
        raise DataError(f"{str(path)!r} takes data from {foreign[0]!r}, which is not below the folder; correct it there")


def reason_of(error: BaseException) -> str:
    """Return one line on the cause of an error: `datasets` hides the reason for a damaged file in a generic error."""
    while isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, ConnectionError) and is_offline_mode():
        return f"{text}; HF_HUB_OFFLINE is set; unset it to read from the Hub"
    return text


def source_revision(rows: datasets.Dataset) -> str | None:
    """Return the commit of a Hub source, from the URLs of the files that `datasets` recorded; `None` if there is none."""
    for url in rows.info.download_checksums or {}:
        if "@" in url:
            return url.rsplit("@", 1)[1].split("/", 1)[0]
    return None
