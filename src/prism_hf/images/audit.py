"""Faults of real data that no single image shows: the same images in training and test, blank images, unused files."""

import hashlib
from collections import defaultdict

import numpy as np

from ..errors import DataError
from ..recipe import NO_IMAGES, DataRecipe
from .open_source import files_used
from .source import ImageSplit, SourceData

MOST_SHARED = 0.1
"""The largest share of the test images that may also be training images."""
Digests = dict[int, bytes]
"""What an image contains, by its row."""


def describe_source(data: SourceData, recipe: DataRecipe) -> str:
    """Return a line on what is used of the data: images, classes, columns and files."""
    if recipe.source == NO_IMAGES:
        return f"data: no real images, {data.num_classes:,} classes named by the logit teacher"
    counts = f"{len(data.train):,} training and {len(data.test):,} test images of {data.num_classes:,} classes"
    used, left = files_used(recipe)
    files = "".join(f", {count:,} in {split!r}" for split, count in used.items())
    found = f"; {sum(used.values()) + len(left):,} files found{files}" if used else ""
    return f"data {recipe.source!r}: {counts}, columns {' and '.join(map(repr, data.train.columns))}{found}"


def faults_of(data: SourceData, recipe: DataRecipe) -> list[str]:
    """Return a warning for each fault of the real data.

    Images are compared by their pixels at the working size; blank images are not compared. Splits that do not fit in memory
    are sampled: up to 2048 images are searched for blank ones, and up to 2048 test images for copies of training files.

    Raises:
        DataError: More than `MOST_SHARED` of the test images are also training images.
    """
    if recipe.source == NO_IMAGES:
        return []
    _, left = files_used(recipe)
    warnings = [f"files in no split, which are not used: {len(left):,}, such as {left[0]!r}"] if left else []
    pixels = []
    for split in (data.train, data.test):
        counts = np.bincount(split.labels, minlength=data.distilled_classes)
        if not counts.all():
            name = data.class_names[int(np.argmin(counts))]
            warnings.append(f"classes without images in split {split.name!r}: {(counts == 0).sum():,}, such as {name!r}")
        rows = np.arange(len(split)) if split.fits_in_memory else split.sample
        digests, blank = _pixels(split, rows)
        pixels.append(digests)
        if blank:
            warnings.append(
                f"images of a single color: {len(blank):,} of {len(rows):,}, such as {split.where(blank[0])}; if they "
                "should not be blank, check their transparency (data.background) and bits (data.white_level)"
            )
    train, test = pixels
    if not data.train.fits_in_memory or not data.test.fits_in_memory:
        sizes = data.test.file_sizes[data.test.sample]
        train = _files(data.train, np.flatnonzero(np.isin(data.train.file_sizes, sizes)))
        test = _files(data.test, data.test.sample)
    return warnings + _shared(data, train, test) + _contradictions(data.train, train)


def _pixels(split: ImageSplit, rows: np.ndarray) -> tuple[Digests, list[int]]:
    """Return the digests of the working images of some rows, and the rows of those with a single color."""
    digests, blank = {}, []
    for part in np.array_split(rows, range(256, len(rows), 256)):
        for row, image in zip(part.tolist(), split.images(part).numpy(), strict=True):
            if (image == image[:, :1, :1]).all():
                blank.append(row)
            else:
                digests[row] = hashlib.sha256(image.tobytes()).digest()
    return digests, blank


def _files(split: ImageSplit, rows: np.ndarray) -> Digests:
    return {row: hashlib.sha256(split.file(row)).digest() for row in rows.tolist()}


def _shared(data: SourceData, train: Digests, test: Digests) -> list[str]:
    """Warn of test images that are training images, or refuse them."""
    first = {digest: row for row, digest in reversed(train.items())}
    shared = [(row, first[digest]) for row, digest in test.items() if digest in first]
    if not shared:
        return []
    pairs = [f"{data.test.where(row)} is {data.train.where(same)}" for row, same in shared[:3]]
    pairs += ["..."] if len(shared) > 3 else []
    text = f"test images that are also training images: {len(shared):,} of {len(test):,} ({'; '.join(pairs)})"
    if len(shared) > MOST_SHARED * len(test):
        raise DataError(f"{text}; at most {MOST_SHARED:.0%} may be; remove the copies, or use another test split")
    return [f"{text}; remove the copies, since they raise every score"]


def _contradictions(split: ImageSplit, digests: Digests) -> list[str]:
    """Warn of images that are in the training data more than once, with different classes."""
    same: dict[bytes, list[int]] = defaultdict(list)
    for row, digest in digests.items():
        same[digest].append(row)
    wrong = [rows for rows in same.values() if len(set(split.labels[rows])) > 1]
    if not wrong:
        return []
    example = " and ".join(split.where(row) for row in wrong[0][:2])
    return [f"training images with more than one class: {len(wrong):,}, such as {example}"]
