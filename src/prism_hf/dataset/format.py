"""Format of a distilled dataset: the columns of its two tables and how rows are split into shards.

    data/train-*.parquet    config "default": image, label, slot, teacher_logits, job
    views/train-*.parquet   config "views": one row per image and epoch, with its soft label; sorted by epoch
    recipe.yaml, provenance.json, README.md, assets/

docs/dataset_format.md is the specification. A dataset contains neither pickles nor scripts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import datasets
import numpy as np

from ..recipe import VIEW_ROW_BYTES, Codec, Recipe, batch_ranges
from .codecs import label_features

FORMAT_VERSION = 1
IMAGES, VIEWS = "data", "views"
"""Folder names of the two tables."""
TABLES = {"default": IMAGES, VIEWS: VIEWS}
"""Folder of the shards, by config name."""
DISTILLED, RANDOM_REAL = "distilled", "random_real"
"""The two kinds of images that a dataset can contain."""

GROUP_BYTES = 4 * 2**20
"""Approximate size of a row group, which is what a reader or the writer keeps in memory at a time."""
SMALLEST_GROUP = 1000
"""Row groups of views with fewer rows are joined with the next epochs: each has about two kilobytes of metadata."""
_SHARD_VIEWS = 2**13
"""Maximum views in a shard with more than one epoch; a killed run loses at most one shard."""


def image_features(class_names: Sequence[str]) -> datasets.Features:
    """Return the features of config "default"; `teacher_logits` are raw float16 logits of the image itself, not a view."""
    return datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(class_names)),
            "slot": datasets.Value("int32"),
            "teacher_logits": datasets.List(datasets.Value("float16"), length=len(class_names)),
            "job": datasets.Value("int32"),
        }
    )


def view_features(num_classes: int, codec: Codec = "float16", top_k: int | None = None) -> datasets.Features:
    """Return the features of config "views"; boxes are (top, left, height, width) in pixels."""
    box = datasets.List(datasets.Value("int16"), length=4)
    return datasets.Features(
        {
            "epoch": datasets.Value("int32"),
            "batch": datasets.Value("int32"),
            "image_index": datasets.Value("int32"),
            "crop": box,
            "flip": datasets.Value("bool"),
            "mix_image_index": datasets.Value("int32"),
            "mix_crop": box,
            "mix_flip": datasets.Value("bool"),
            "mix_box": box,
            "mix_weight": datasets.Value("float32"),
            **label_features(codec, num_classes, top_k),
        }
    )


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a table; `rows` are its image rows in `data`, or its epochs in `views`."""

    name: str
    rows: range


def image_shards(recipe: Recipe, count: int) -> list[Shard]:
    """Return the shards of a table of `count` images, sized by raw pixels and split only between relabeling batches."""
    batches = batch_ranges(count, recipe.relabel.batch_size)
    wanted = math.ceil(count * _image_row_bytes(recipe) / (recipe.packaging.shard_megabytes * 10**6))
    first = np.linspace(0, len(batches), min(wanted, len(batches)) + 1).astype(int).tolist()
    ends = [batches[number].start for number in first[:-1]] + [count]
    return _shards([range(*bounds) for bounds in pairwise(ends)])


def view_shards(recipe: Recipe, count: int) -> list[Shard]:
    """Return the shards of the views of `count` images; each shard contains whole epochs."""
    labels = recipe.stored_labels
    epochs, row_bytes = labels.epochs, labels.row_bytes(recipe.data.num_classes) + VIEW_ROW_BYTES
    fit = recipe.packaging.shard_megabytes * 10**6 // (row_bytes * count)
    each = max(1, min(fit, _SHARD_VIEWS // count))
    return _shards([range(start, min(start + each, epochs)) for start in range(0, epochs, each)])


def _shards(parts: Sequence[range]) -> list[Shard]:
    return [Shard(f"train-{number:05d}-of-{len(parts):05d}.parquet", rows) for number, rows in enumerate(parts)]


def image_group_rows(recipe: Recipe) -> int:
    """Return the number of rows in a row group of images."""
    return max(1, GROUP_BYTES // _image_row_bytes(recipe))


def view_group_rows(row_bytes: int) -> int:
    """Return the target number of rows in a row group of views, which has a part of an epoch, or whole epochs."""
    return max(1, GROUP_BYTES // row_bytes)


def _image_row_bytes(recipe: Recipe) -> int:
    return recipe.data.channels * recipe.data.size**2 + 2 * recipe.data.num_classes
