"""A part of a large source: only as many images of each class as a recipe needs, read as a stream and kept in a cache."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec
import numpy as np

from ..errors import DataError
from ..recipe import DataRecipe
from ..runtime import derived_seed
from .classes import choose_classes
from .columns import find_image_column, find_label_column

_AT_ONCE = 100
"""Images in memory before they are written."""


def read_limited(builder: datasets.DatasetBuilder, recipe: DataRecipe, split: str, state: str) -> datasets.Dataset:
    """Stream a split until every class has `images_per_class` images, and keep those in the cache of `datasets`.

    The first images of each class are taken. The test split is kept whole, without downloading the training split.
    `state` identifies the version of the source: another one is streamed again.

    Raises:
        DataError: The labels are not a ClassLabel, whose names are known before the last row.
    """
    stream = builder.as_streaming_dataset(split=split)
    if stream.features is None:
        raise DataError(f"split {split!r} has no schema, so it cannot be read in part; remove data.images_per_class")
    empty = datasets.Dataset.from_dict({name: [] for name in stream.features}, features=stream.features)
    image = find_image_column(empty, recipe)
    label = find_label_column(empty, recipe, image)
    feature = stream.features[label]
    if not isinstance(feature, datasets.ClassLabel):
        raise DataError(
            f"column {label!r} is not a ClassLabel, so its classes are only known after the last row; remove "
            "data.images_per_class, or cast the column"
        )
    wanted: Sequence[int] = range(len(feature.names))
    if recipe.classes is not None:
        wanted = choose_classes(recipe.classes, feature.names, f"data.source {recipe.source!r}", DataError)
    count = recipe.images_per_class if split == recipe.train_split else None
    kept = datasets.Features({image: stream.features[image], label: feature})
    rows = stream.select_columns([image, label])
    if isinstance(kept[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    parts = [recipe.source, recipe.config, state, split, count, list(wanted), image, label]
    settings = {"rows": rows, "image": image, "label": label, "wanted": frozenset(wanted), "count": count}
    return datasets.Dataset.from_generator(
        _first_of_each,
        features=kept,
        gen_kwargs=settings,  # without lists, which `datasets` would divide into shards
        cache_dir=str(Path(datasets.config.HF_DATASETS_CACHE) / "prism-hf"),
        fingerprint=f"{derived_seed(0, json.dumps(parts)):016x}",
        writer_batch_size=_AT_ONCE,
    )


def _first_of_each(
    rows: datasets.IterableDataset, image: str, label: str, wanted: Collection[int], count: int | None
) -> Iterator[dict[str, Any]]:
    """Yield the first `count` rows of each wanted class, and stop when there are enough; `None` yields all rows."""
    found: Counter[int] = Counter()
    full = 0
    for row in rows:
        number = row[label]
        if number not in wanted or found[number] == count:
            continue
        yield row | {image: _with_bytes(row[image])}
        found[number] += 1
        full += found[number] == count
        if full == len(wanted):
            return


def _with_bytes(cell: Any) -> Any:
    """Return an image with its bytes, which a stream of image files leaves on the Hub."""
    if not isinstance(cell, dict) or cell.get("bytes") is not None:
        return cell
    with fsspec.open(cell["path"], "rb") as file:
        return {"bytes": file.read(), "path": PurePosixPath(cell["path"]).name}


def limit(rows: datasets.Dataset, recipe: DataRecipe) -> datasets.Dataset:
    """Return `images_per_class` images of each class, drawn at random: files are sorted, and only these are opened."""
    labels, kept = np.array(rows[find_label_column(rows, recipe, find_image_column(rows, recipe))]), []
    for label in np.unique(labels).tolist():
        of_class = np.flatnonzero(labels == label)
        draw = np.random.default_rng(derived_seed(0, "images_per_class", label))
        kept.append(draw.permutation(of_class)[: recipe.images_per_class])
    return rows.select(np.sort(np.concatenate(kept)))
