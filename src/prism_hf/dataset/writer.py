"""How a distilled data set is stored: a folder that plain `datasets` loads, streams and explains.

    data/train-*.parquet    config "default": image, label, slot, teacher_logits, job
    views/train-*.parquet   config "views": one row per image and epoch, with its label; sorted by epoch
    recipe.yaml, provenance.json, README.md, assets/

docs/dataset_format.md is the contract. No pickles, no scripts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from ..recipe.schema import Recipe
from ..recipe.yaml_file import dump_recipe
from ..runtime.store import write_bytes, write_whole

VIEWS = "views"

GROUP_BYTES = 4 * 2**20
"""A row group holds about this many bytes: what a reader, and this writer, has in memory at once."""

Epoch = dict[str, np.ndarray]
"""Columns of views, some rows or a whole epoch; see `relabel.relabel_batches`."""


def image_features(class_names: Sequence[str]) -> datasets.Features:
    """Features of config "default"; `teacher_logits` are raw, float16, of the image without a view."""
    return datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(class_names)),
            "slot": datasets.Value("int32"),
            "teacher_logits": datasets.List(datasets.Value("float16"), length=len(class_names)),
            "job": datasets.Value("int32"),
        }
    )


def view_features(num_classes: int) -> datasets.Features:
    """Features of config "views"; boxes are top, left, height, width in pixels."""
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
            "teacher_logits": datasets.List(datasets.Value("float16"), length=num_classes),
        }
    )


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Images as they ship, class-major; a complete set has row = class * ipc + slot.

    Attributes:
        encoded: File bytes of each image, N.
        labels: (N,) int64.
        slots: (N,) int64.
        jobs: Synthesis job of each image, or -1 for real ones, (N,) int64.
        teacher_logits: (N, K) float16.
    """

    encoded: list[bytes]
    labels: Tensor
    slots: Tensor
    jobs: Tensor
    teacher_logits: Tensor

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def encoded_bytes(self) -> int:
        """Bytes of all image files."""
        return sum(map(len, self.encoded))

    def read(self, start: int, stop: int) -> ImageTable:
        """Rows `start` to `stop`."""
        cut = slice(start, stop)
        return ImageTable(self.encoded[cut], self.labels[cut], self.slots[cut], self.jobs[cut], self.teacher_logits[cut])


class ImageSource(Protocol):
    """Images that are read a few at a time, so that memory does not grow with their number."""

    def __len__(self) -> int:
        """N."""

    @property
    def encoded_bytes(self) -> int:
        """Bytes of all image files."""

    def read(self, start: int, stop: int) -> ImageTable:
        """Rows `start` to `stop`."""


def build_dataset(
    folder: Path,
    images: ImageSource,
    epochs: Iterable[Iterable[pa.Table]],
    *,
    recipe: Recipe,
    class_names: Sequence[str],
) -> None:
    """Write the two tables and the recipe into `folder`, replacing older tables.

    Args:
        folder: The data set folder.
        images: The image table, or what reads it in parts.
        epochs: The views, in order of epochs, each as one or more tables (`view_table`), which become row groups.
        recipe: What made them.
        class_names: K names.
    """
    shard_bytes = recipe.packaging.shard_megabytes * 10**6
    write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
    _write_images(folder / "data", images, class_names, recipe.packaging.image_format, shard_bytes)
    row_bytes = 2 * len(class_names) + 64
    per_shard = max(1, shard_bytes // (row_bytes * len(images)))
    _write_views(folder / VIEWS, epochs, per_shard, recipe.relabel.epochs)


def _write_images(
    folder: Path, images: ImageSource, class_names: Sequence[str], image_format: str, shard_bytes: int
) -> None:
    count = len(images)
    total = images.encoded_bytes + count * len(class_names) * 2
    shards = max(1, -(-total // shard_bytes))
    bounds = np.linspace(0, count, shards + 1).astype(int).tolist()
    per_group = max(1, GROUP_BYTES * count // total)
    extension = "jpg" if image_format == "jpeg" else image_format
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        tables = (
            _image_table(images.read(a, min(a + per_group, last)), a, image_features(class_names), extension)
            for a in range(first, last, per_group)
        )
        name = f"train-{number:05d}-of-{shards:05d}.parquet"
        write_whole(folder / name, lambda draft, tables=tables: _write_parquet(draft, tables))  # type: ignore[misc]
    _remove_others(folder, shards)


def _image_table(images: ImageTable, first: int, features: datasets.Features, extension: str) -> pa.Table:
    cells = [{"bytes": data, "path": f"{first + i:06d}.{extension}"} for i, data in enumerate(images.encoded)]
    columns = [
        pa.array(cells, type=features.arrow_schema.field("image").type),
        pa.array(images.labels.numpy()),
        pa.array(images.slots.numpy().astype(np.int32)),
        _fixed_list(images.teacher_logits.numpy()),
        pa.array(images.jobs.numpy().astype(np.int32)),
    ]
    return pa.table(dict(zip(features, columns, strict=True)), schema=features.arrow_schema)


def _write_views(folder: Path, epochs: Iterable[Iterable[pa.Table]], per_shard: int, count: int) -> None:
    shards = -(-count // per_shard)
    source = iter(epochs)
    for number in range(shards):
        here = itertools.islice(source, per_shard)
        name = f"train-{number:05d}-of-{shards:05d}.parquet"
        write_whole(
            folder / name,
            lambda draft, here=here: _write_parquet(draft, itertools.chain.from_iterable(here)),  # type: ignore[misc]
        )
    _remove_others(folder, shards)


def view_table(epoch: Epoch, num_classes: int) -> pa.Table:
    """Columns of views as rows of config "views"."""
    features = view_features(num_classes)
    columns = {key: _fixed_list(v) if v.ndim == 2 else pa.array(v) for key, v in epoch.items()}
    return pa.table({key: columns[key] for key in features}, schema=features.arrow_schema)


def _fixed_list(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])


def _write_parquet(path: Path, tables: Iterable[pa.Table]) -> None:
    """One row group per table. Encoded images do not shrink any more; logits do, once their bytes are split."""
    writer: pq.ParquetWriter | None = None
    try:
        for table in tables:
            if writer is None:
                leaves = _leaves(table.schema)
                split = [name for name in leaves if name.startswith("teacher_logits")]
                compression = {name: "none" if name == "image.bytes" else "zstd" for name in leaves}
                writer = pq.ParquetWriter(
                    path,
                    table.schema,
                    compression=compression,
                    use_dictionary=[name for name in leaves if name not in (*split, "image.bytes", "image.path")],
                    column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
                    write_page_index=True,
                )
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _leaves(schema: pa.Schema) -> list[str]:
    buffer = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), buffer)
    parquet = pq.ParquetFile(pa.BufferReader(buffer.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet))]


def _remove_others(folder: Path, shards: int) -> None:
    for path in folder.glob("train-*.parquet"):
        if not path.name.endswith(f"-of-{shards:05d}.parquet"):
            path.unlink()
