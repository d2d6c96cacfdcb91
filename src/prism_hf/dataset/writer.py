"""Write the tables of a distilled dataset shard by shard, in memory that does not grow with the number of rows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from ..recipe import Recipe, StoredLabels, dump_recipe
from ..runtime import write_bytes, write_whole
from .codecs import encode_logits
from .format import (
    IMAGES,
    SMALLEST_GROUP,
    VIEWS,
    image_features,
    image_group_rows,
    image_shards,
    view_features,
    view_group_rows,
    view_shards,
)

Columns = Mapping[str, np.ndarray]
"""Columns of a batch of views from one epoch; see `relabel_batches`."""


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Rows of the image table; the full table is sorted by class, and in a complete set row = class * ipc + slot."""

    encoded: Sequence[bytes]  # encoded file of each image, length B
    labels: Tensor  # (B,) int64
    slots: Tensor  # (B,) int64
    jobs: Tensor  # (B,) int64, synthesis job of each image, or -1 for a real image
    teacher_logits: Tensor  # (B, K) float16

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, rows: slice) -> "ImageRows":
        columns = (self.labels, self.slots, self.jobs, self.teacher_logits)
        return ImageRows(self.encoded[rows], *(column[rows] for column in columns))


def build_dataset(
    folder: Path, images: ImageRows, epochs: Sequence[Columns], *, recipe: Recipe, class_names: Sequence[str]
) -> None:
    """Write both tables and the recipe into a folder, from images and views in memory; existing tables are replaced.

    The images are sorted by class; `epochs` holds the views of each epoch (see `relabel_epoch`).
    """
    write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
    shards: dict[Path, Iterable[pa.Table]] = {}
    for shard in image_shards(recipe, len(images)):
        rows = images[shard.rows.start : shard.rows.stop]
        shards[folder / IMAGES / shard.name] = image_tables([rows], shard.rows.start, recipe, class_names)
    for shard in view_shards(recipe, len(images)):
        views = [view_tables([epochs[epoch]], recipe.stored_labels, len(class_names)) for epoch in shard.rows]
        shards[folder / VIEWS / shard.name] = whole_groups(chain.from_iterable(views))
    for path, tables in shards.items():
        write_whole(path, partial(write_parquet, tables=tables))
    for table in (IMAGES, VIEWS):
        for path in set((folder / table).glob("train-*.parquet")).difference(shards):
            path.unlink()


def image_tables(
    batches: Iterable[ImageRows], first: int, recipe: Recipe, class_names: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield the row groups of a shard of images from batches of its rows; its first image is row `first` of the table."""
    features, image_format = image_features(class_names), recipe.packaging.image_format
    extension = "jpg" if image_format == "jpeg" else image_format
    numbers = count(first)

    def table(images: ImageRows) -> pa.Table:
        cells = [{"bytes": data, "path": f"{next(numbers):06d}.{extension}"} for data in images.encoded]
        columns = {
            "image": pa.array(cells, type=features.arrow_schema.field("image").type),
            "label": pa.array(images.labels.numpy()),
            "slot": pa.array(images.slots.numpy().astype(np.int32)),
            "teacher_logits": _fixed_list(images.teacher_logits.numpy()),
            "job": pa.array(images.jobs.numpy().astype(np.int32)),
        }
        return pa.table(columns, schema=features.arrow_schema)

    yield from _regrouped(map(table, batches), image_group_rows(recipe))


def view_tables(batches: Iterable[Columns], labels: StoredLabels, num_classes: int) -> Iterator[pa.Table]:
    """Yield the row groups of one epoch of views from its batches, which have no logits if the codec is `seed`."""
    rows = view_group_rows(labels.row_bytes(num_classes))
    features = view_features(num_classes, labels.codec, labels.top_k)
    pending: list[Columns] = []
    for batch in batches:
        logits = encode_logits(batch["teacher_logits"], labels) if "teacher_logits" in batch else {}
        pending.append({**batch, **logits})
        if sum(len(part["epoch"]) for part in pending) >= rows:
            yield _view_table(pending, features)
            pending = []
    if pending:
        yield _view_table(pending, features)


def whole_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows with at least `SMALLEST_GROUP` rows in a table, except for the last one."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(map(len, pending)) >= SMALLEST_GROUP:
            yield pa.concat_tables(pending).combine_chunks()
            pending = []
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def _view_table(batches: Sequence[Columns], features: datasets.Features) -> pa.Table:
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in features}
    columns = {key: _fixed_list(value) if value.ndim == 2 else pa.array(value) for key, value in joined.items()}
    return pa.table(columns, schema=features.arrow_schema)


def _fixed_list(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])


def _regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of exactly `rows` rows each; the last table may be shorter."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        while sum(map(len, pending)) >= rows:
            joined = pa.concat_tables(pending)
            yield joined.slice(0, rows).combine_chunks()
            pending = [joined.slice(rows)] if len(joined) > rows else []
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def write_parquet(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema as row groups: encoded images uncompressed, logits byte-stream-split and compressed."""
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for table in tables:
            writer = writer or stack.enter_context(_writer(path, table.schema))
            writer.write_table(table)


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    leaves = _leaves(schema)
    # Parquet stores 8-bit integers in 32 bits; split by byte, the empty bytes compress to nothing.
    split = [name for name in leaves if name.startswith(("teacher_logits", "top_logits", "logit"))]
    return pq.ParquetWriter(
        path,
        schema,
        compression={name: "none" if name == "image.bytes" else "zstd" for name in leaves},
        use_dictionary=[name for name in leaves if name not in (*split, "image.bytes", "image.path")],
        column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
        write_page_index=True,
    )


def _leaves(schema: pa.Schema) -> list[str]:
    buffer = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), buffer)
    parquet = pq.ParquetFile(pa.BufferReader(buffer.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet))]
