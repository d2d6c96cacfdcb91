"""A folder of image files: train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE for one split.

Only the place of a file counts. `datasets` also looks for words such as "train" and "test" in the names of classes and
files, so the test images of a class called "train" would be training images.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath

import datasets
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules import _EXTENSION_TO_MODULE
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..errors import DataError

Layout = dict[str, dict[str, list[str]]]
"""The files of each class, for each split."""
_ENDINGS = (*ImageFolder.EXTENSIONS, ".avif", ".qoi")  # `datasets` does not know the last two, which Pillow reads
_WORDS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
_EXPECTED = "expected train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE"


def is_image_folder(files: Collection[str]) -> bool:
    """Return whether these files are images, some with files of notes, rather than tables, some with figures."""
    if any(PurePosixPath(file).name in ImageFolder.METADATA_FILENAMES for file in files):
        return False
    kinds = Counter(PurePosixPath(file).suffix.lower() for file in files)
    images = sum(kinds[ending] for ending in _ENDINGS)
    tables = sum(kinds[ending] for ending in (".parquet", ".arrow"))
    others = sum(kinds[ending] for ending in kinds.keys() & _EXTENSION_TO_MODULE.keys() - {*_ENDINGS})
    return images > 0 and images >= others and images > 10 * tables


def is_image(file: str) -> bool:
    """Return whether a file has the name of an image."""
    return PurePosixPath(file).suffix.lower() in _ENDINGS


def read_images(folder: Path, files: Iterable[str], split: str) -> datasets.Dataset:
    """Return the paths and labels of the images in a split. The classes are those of all splits, sorted by name.

    Raises:
        DataError: The images are not in class folders, or the split does not exist.
    """
    layout = read_layout(files)
    names = sorted({name for classes in layout.values() for name in classes})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {}
    for key, classes in layout.items():
        found = sorted((file, names.index(name)) for name, part in classes.items() for file in part)
        columns = {"image": [str(folder / file) for file, _ in found], "label": [label for _, label in found]}
        rows[key] = datasets.Dataset.from_dict(columns, features=features)
    return _select(rows, split)


def _select(splits: Mapping[str, datasets.Dataset], wanted: str) -> datasets.Dataset:
    """Return a split by its name, by another word for it (`val` is `validation`), or in part (`train[:80%]`)."""
    if wanted not in splits:
        same = [name for name in splits if _WORDS.get(wanted, wanted) == split_of(name)]
        if len(same) == 1:
            return splits[same[0]]
    try:
        parts = datasets.ReadInstruction.from_spec(wanted).to_absolute({name: len(splits[name]) for name in splits})
    except (ValueError, AssertionError) as error:
        hint = "" if len(splits) > 1 else "; make folders train/CLASS and test/CLASS, or set data.validation_fraction"
        raise DataError(f"it has no split {wanted!r}; its splits are {', '.join(map(repr, splits))}{hint}") from error
    whole = [splits[part.splitname] for part in parts]
    ends = [len(rows) if part.to is None else part.to for part, rows in zip(parts, whole, strict=True)]
    chosen = [rows.select(range(part.from_ or 0, end)) for part, rows, end in zip(parts, whole, ends, strict=True)]
    return datasets.concatenate_datasets(chosen)


def split_of(name: str) -> str:
    """Return the split that a folder's name stands for, such as `test` for `Testing` or `my_test`, or else the name."""
    words = {_WORDS[word] for word in re.split("[-._ 0-9]+", name.lower()) if word in _WORDS}
    return words.pop() if len(words) == 1 else name


def read_layout(files: Iterable[str]) -> Layout:
    """Return the image files of each class and split, from paths relative to the folder.

    Top-level folders are splits if they are named like splits and contain class folders. A single folder around all others
    is skipped. A class has the name of the folder that directly contains its images.

    Raises:
        DataError: An image is not in a class folder, or the class folders are not all equally deep.
    """
    images = sorted(filter(is_image, files))
    below = {file: PurePosixPath(file).parts for file in images}
    while _is_wrapped(list(below.values())):
        below = {file: path[1:] for file, path in below.items()}
    if stray := [file for file, path in below.items() if len(path) == 1]:
        raise DataError(f"{stray[0]!r} is not in a class folder; {_EXPECTED}")
    tops = {path[0] for path in below.values()}
    flat = {path[0] for path in below.values() if len(path) == 2}
    if flat and all(top.lower() in _WORDS for top in tops):
        example = max((file for file, path in below.items() if len(path) == 2), key=lambda file: below[file][0])
        raise DataError(f"there are no class folders below {below[example][0]}/, such as for {example!r}; {_EXPECTED}")
    splits = set() if flat else {top for top in tops if top.lower() in _WORDS}
    if not flat and not splits and all(split_of(top) != top for top in tops):
        splits = tops
    if not splits:
        return {"train": _classes(below)}
    return {top: _classes({file: path[1:] for file, path in below.items() if path[0] == top}) for top in sorted(splits)}


def split_folders(files: Iterable[str]) -> dict[str, str]:
    """Return the pattern of the files in each split if all files are in top-level folders named like splits, or else {}."""
    tops = {PurePosixPath(file).parts[0] for file in files if not PurePosixPath(file).parts[0].lower().startswith("readme")}
    splits = {_WORDS[top.lower()]: f"{top}/**" for top in tops if top.lower() in _WORDS}
    return splits if len(splits) == len(tops) else {}


def _is_wrapped(paths: Sequence[tuple[str, ...]]) -> bool:
    """Return whether one folder, which is not a split, is around all class folders, as in photos/CLASS/IMAGE."""
    top = paths[0][0]
    named = top.lower() in _WORDS or split_of(top) != top
    return not named and all(path[0] == top and len(path) > 2 for path in paths)


def _classes(below: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Return the files of each class. Names are in Unicode's composed form (NFC), since systems store them differently."""
    shallow, deep = min(below, key=lambda file: len(below[file])), max(below, key=lambda file: len(below[file]))
    if len(below[shallow]) != len(below[deep]):
        raise DataError(f"{shallow!r} and {deep!r} are not equally deep, so their classes are not clear; {_EXPECTED}")
    classes: dict[str, list[str]] = {}
    for folder, group in groupby(below, lambda file: below[file][:-1]):
        name, files = unicodedata.normalize("NFC", folder[-1]), list(group)
        if name in classes:
            raise DataError(
                f"{classes[name][0]!a} and {files[0]!a} are in two folders called {name!r}, which would be one class; "
                f"{_EXPECTED}"
            )
        classes[name] = files
    return classes
