"""The rows of a source: open its splits without following links and paths out of it, and find their columns."""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import HfApi, constants, is_offline_mode
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ..errors import DataError, PrismError
from ..recipe import DataRecipe
from ..runtime import (
    digest,
    folder_or_hub_id,
    folder_state,
    foreign_files,
    homes_of,
    is_inside,
    is_plain_path,
    local_folder,
    read_card,
    read_json,
    visible_entries,
    write_json,
)
from .image_folder import is_image_folder, read_images, read_layout, split_folders
from .limited import limit, read_limited

_NOTES = (".md", ".txt", ".json", ".yaml", ".yml", ".xml", ".cff", ".bib", ".log")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".tbz2", ".xz", ".txz", ".7z", ".rar", ".zst", ".lz4")


def open_split(recipe: DataRecipe, name: str) -> datasets.Dataset:
    """Open one split of the digits, of a local folder, or of a dataset on the Hub.

    Raises:
        DataError: The source or the split is missing, unreadable, or leads out of its folder.
    """
    limited = recipe.images_per_class is not None and name == recipe.train_split
    if recipe.source == "digits":
        return limit(_open_digits(name), recipe) if limited else _open_digits(name)
    what = f"data.source {recipe.source!r}" + (f", config {recipe.config!r}" if recipe.config else "")
    folder = folder_or_hub_id(recipe.source, what, give="`digits`, a Hub id or the path of a folder")
    try:
        if folder is None:
            if recipe.images_per_class is not None:
                return _open_limited(recipe, name)
            return datasets.load_dataset(recipe.source, recipe.config, split=name, revision=recipe.revision)
        files = _check_local(folder)
        if (folder / "state.json").is_file():
            raise DataError(f"{what} was saved as one Dataset without splits; save a DatasetDict with {name!r}")
        if (folder / "dataset_dict.json").is_file():
            saved = _open_saved(folder, name, what)
            return limit(saved, recipe) if limited else saved
        if _are_images(folder, files, recipe):
            rows = _open_images(folder, files, name, what)
            return limit(rows, recipe) if limited else rows
        builder = _builder(folder, files, recipe)
        if limited:
            return read_limited(builder, recipe, name, folder_state(folder))
        builder.download_and_prepare()
        return builder.as_dataset(split=name)
    except PrismError:
        raise
    except (datasets.exceptions.DatasetNotFoundError, GatedRepoError) as error:
        if "gated" not in str(error):
            raise DataError(f"{what}, split {name!r} cannot be loaded: {reason_of(error)}") from error
        page = f"{constants.ENDPOINT}/datasets/{recipe.source}"
        raise DataError(
            f"{what} is gated: accept its terms at {page}, then run `hf auth login` or set HF_TOKEN; or give a local copy "
            "with data.source=FOLDER"
        ) from error
    except Exception as error:  # untrusted bytes reach a dozen readers of `datasets`, each with its own errors
        raise DataError(f"{what}, split {name!r} cannot be loaded: {reason_of(error)}") from error


def _open_limited(recipe: DataRecipe, name: str) -> datasets.Dataset:
    """Open a part of a dataset on the Hub, at one commit, without downloading the rest."""
    limits = (recipe.images_per_class, recipe.classes, name, name == recipe.train_split)
    wanted = (recipe.source, recipe.config, recipe.revision, recipe.image_column, recipe.label_column, limits)
    note = Path(datasets.config.HF_DATASETS_CACHE) / "prism-hf" / f"{digest(wanted)}.json"
    if is_offline_mode() and note.is_file():
        known = read_json(note)
        rows = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in known["files"]])
    else:
        commit = HfApi().dataset_info(recipe.source, revision=recipe.revision).sha
        builder = datasets.load_dataset_builder(recipe.source, recipe.config, revision=commit)
        rows = read_limited(builder, recipe, name, str(commit))
        known = {"files": [file["filename"] for file in rows.cache_files], "commit": commit}
        write_json(note, known)
    rows.info.download_checksums = {f"{recipe.source}@{known['commit']}/": {}}  # where `source_revision` looks
    return rows


def _are_images(folder: Path, files: Collection[str], recipe: DataRecipe) -> bool:
    """Return whether a folder has images in class folders, and no card or config that says which of them to use."""
    return recipe.config is None and not _is_configured(folder) and is_image_folder(files)


def _builder(folder: Path, files: Collection[str], recipe: DataRecipe) -> datasets.DatasetBuilder:
    """Return the reader of `datasets` for a local folder of tables."""
    # `datasets` keys its cache by the card of a folder alone, so this cache path depends on the state of all files.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "prism-hf" / folder_state(folder)
    # Absolute, since `datasets` takes a folder called "text" for its reader of that name, which reads all files around.
    place = str(folder.absolute())
    if re.search(r"[][*?{}]|::", place):
        raise DataError(
            f"data.source {place!r} has characters that `datasets` takes for a pattern ([ ] {{ }} * ? ::), so its tables "
            "cannot be read; rename the folder"
        )
    parts = split_folders(files) if recipe.config is None and not _is_configured(folder) else {}
    return datasets.load_dataset_builder(place, recipe.config, data_files=parts or None, cache_dir=str(cache))


def _is_configured(folder: Path) -> bool:
    """Return whether the card of a folder says which files belong to which split."""
    card = folder / datasets.config.REPOCARD_FILENAME
    return card.is_file() and "configs" in read_card(card.read_text(encoding="utf-8"))


def _open_images(folder: Path, files: Collection[str], name: str, what: str) -> datasets.Dataset:
    try:
        return read_images(folder, files, name)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def files_used(recipe: DataRecipe) -> tuple[dict[str, int], list[str]]:
    """Return the number of files in each split, and the other files of the source, which are in no split.

    Both are empty for digits, for a `save_to_disk` folder, and for a Hub source that is read from the cache.
    """
    if recipe.source == "digits":
        return {}, []
    folder = local_folder(recipe.source)
    if folder is None:
        builder = datasets.load_dataset_builder(recipe.source, recipe.config, revision=recipe.revision)
        base = builder.base_path or ""
        is_folder = isinstance(builder, ImageFolder) and "@" in base
        return _files_of(builder, _files_on_hub(recipe.source, base.rpartition("@")[2]) if is_folder else [])
    if (folder / "dataset_dict.json").is_file():
        return {}, []
    files = _check_local(folder)
    if not _are_images(folder, files, recipe):
        return _files_of(_builder(folder, files, recipe), files)
    layout = read_layout(files)
    used = {split: sum(map(len, classes.values())) for split, classes in layout.items()}
    left = set(files).difference(*(part for classes in layout.values() for part in classes.values()))
    return used, sorted(file for file in left if not _is_note(file))


def _files_of(builder: datasets.DatasetBuilder, files: Collection[str]) -> tuple[dict[str, int], list[str]]:
    """Return the number of files that a reader has for each split, and the other files with the same endings."""
    base = f"{builder.base_path}/"
    parts = {
        split: [str(file).removeprefix(base) for file in part] for split, part in (builder.config.data_files or {}).items()
    }
    used = {file for part in parts.values() for file in part}
    endings = {Path(file).suffix for file in used}
    left = sorted(file for file in files if Path(file).suffix in endings and file not in used)
    return {str(split): len(part) for split, part in parts.items()}, left


def _files_on_hub(source: str, commit: str) -> list[str]:
    return HfApi().list_repo_files(source, repo_type="dataset", revision=commit)


def _is_note(file: str) -> bool:
    """Return whether a file describes the data, such as README.md."""
    return Path(file).suffix.lower() in _NOTES or Path(file).name in ("LICENSE", "Thumbs.db")


def _open_digits(name: str) -> datasets.Dataset:
    """Return a split of scikit-learn's digits, 8 x 8 gray. The test split is a fixed stratified quarter."""
    source = load_digits()
    images = np.rint(source.images * (255 / 16)).astype(np.uint8)
    columns = {"image": [Image.fromarray(image) for image in images], "label": source.target.tolist()}
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    train, test = hold_out(datasets.Dataset.from_dict(columns, features=features), source.target, names, 0.25)
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


def hold_out(
    rows: datasets.Dataset, labels: np.ndarray, names: Sequence[str], fraction: float
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split training rows into those to keep and a stratified fraction to hold out. `labels` are class numbers, (N,)."""
    single = [names[label] for label in np.flatnonzero(np.bincount(labels) == 1).tolist()]
    if single:
        found = ", ".join(map(repr, single[:5])) + (", ..." if len(single) > 5 else "")
        raise DataError(
            f"data.validation_fraction {fraction} holds out images of every class, but there is only one image of {found}; "
            "add images or remove the class, or set data.validation_fraction to 0 and name a test split"
        )
    try:
        kept, held = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=0)
    except ValueError as error:
        raise DataError(
            f"data.validation_fraction {fraction} cannot be held out of {len(labels)} images: {error}"
        ) from error
    return rows.select(np.sort(kept)), rows.select(np.sort(held))


def image_homes(source: str) -> tuple[Path, ...]:
    """Return the folders that may contain the image files of a source."""
    folder = local_folder(source)
    if folder is not None:
        return homes_of(folder)
    config = datasets.config
    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
    return tuple(Path(cache).resolve() for cache in (*caches, constants.HF_HUB_CACHE))


def _check_local(folder: Path) -> list[str]:
    """Return the files below a folder. Refuse archives, and links and card paths that lead out: `datasets` follows them."""
    homes, files = homes_of(folder), []
    for entry in visible_entries(folder):
        if entry.is_symlink() and not is_inside(Path(entry.path), homes):
            raise DataError(f"{entry.path!r} is a link that leads out of {str(folder)!r}; put the files themselves there")
        if entry.name.lower().endswith(_ARCHIVES):
            raise DataError(f"{entry.path!r} is an archive, which is not read; unpack it, and move it out of the folder")
        if os.path.isfile(entry.path):  # False for a link to itself
            files.append(os.path.relpath(entry.path, folder))
    _check_card(folder / datasets.config.REPOCARD_FILENAME, "{}")
    _check_card(folder / datasets.config.REPOYAML_FILENAME, "---\n{}\n---\n")  # a header in a separate file
    return files


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
