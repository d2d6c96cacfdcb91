"""How a distilled data set is stored: a folder that plain `datasets` loads, streams and explains.

    data/train-*.parquet    config "default": image, label, slot, teacher_logits, job
    views/train-*.parquet   config "views": one row per image and epoch, with its label; sorted by epoch
    recipe.yaml, provenance.json, README.md, assets/

docs/dataset_format.md is the contract. No pickles, no scripts.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from .recipe import Recipe
from .recipe_file import dump_recipe
from .storage import sha256_of, write_bytes, write_json, write_whole
from .teachers import Teacher

FORMAT_VERSION = 1
VIEWS = "views"
DISTILLED = "distilled"
PACKAGES = ("prism-hf", "torch", "timm", "transformers", "datasets", "accelerate", "numpy", "pillow", "pyarrow")

Epoch = dict[str, np.ndarray]
"""Columns of one epoch of the views table; see `relabel.relabel_epoch`."""


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
    """The shipped images, class-major: row = class * ipc + slot.

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


def build_dataset(
    folder: Path, images: ImageTable, epochs: Iterable[Epoch], *, recipe: Recipe, class_names: Sequence[str]
) -> None:
    """Write the two tables and the recipe into `folder`, replacing older tables.

    Args:
        folder: The data set folder.
        images: The image table.
        epochs: The views, in order of epochs; read one at a time, so memory does not grow with their number.
        recipe: What made them.
        class_names: K names.
    """
    shard_bytes = recipe.packaging.shard_megabytes * 10**6
    write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
    _write_images(folder / "data", images, class_names, recipe.packaging.image_format, shard_bytes)
    row_bytes = 2 * len(class_names) + 64
    per_shard = max(1, shard_bytes // (row_bytes * len(images.encoded)))
    _write_views(folder / VIEWS, epochs, len(class_names), per_shard, recipe.relabel.epochs)


def _write_images(
    folder: Path, images: ImageTable, class_names: Sequence[str], image_format: str, shard_bytes: int
) -> None:
    features = image_features(class_names)
    total = sum(map(len, images.encoded)) + images.teacher_logits.numel() * 2
    shards = max(1, -(-total // shard_bytes))
    bounds = np.linspace(0, len(images.encoded), shards + 1).astype(int)
    extension = "jpg" if image_format == "jpeg" else image_format
    for number, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        cells = [{"bytes": images.encoded[i], "path": f"{i:06d}.{extension}"} for i in range(a, b)]
        columns = [
            pa.array(cells, type=features.arrow_schema.field("image").type),
            pa.array(images.labels[a:b].numpy()),
            pa.array(images.slots[a:b].numpy().astype(np.int32)),
            _fixed_list(images.teacher_logits[a:b].numpy()),
            pa.array(images.jobs[a:b].numpy().astype(np.int32)),
        ]
        table = pa.table(dict(zip(features, columns, strict=True)), schema=features.arrow_schema)
        name = f"train-{number:05d}-of-{shards:05d}.parquet"
        write_whole(folder / name, lambda draft, table=table: _write_parquet(draft, [table]))  # type: ignore[misc]
    _remove_others(folder, shards)


def _write_views(folder: Path, epochs: Iterable[Epoch], num_classes: int, per_shard: int, count: int) -> None:
    features = view_features(num_classes)
    shards = -(-count // per_shard)
    source = iter(epochs)
    for number in range(shards):
        here = min(per_shard, count - number * per_shard)
        tables = (_view_table(next(source), features) for _ in range(here))
        name = f"train-{number:05d}-of-{shards:05d}.parquet"
        write_whole(folder / name, lambda draft, tables=tables: _write_parquet(draft, tables))  # type: ignore[misc]
    _remove_others(folder, shards)


def _view_table(epoch: Epoch, features: datasets.Features) -> pa.Table:
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


def write_provenance(
    folder: Path,
    *,
    recipe: Recipe,
    teachers: Mapping[str, Teacher],
    source_revision: str | None,
    source_on_hub: bool,
    hardware: Mapping[str, object],
    squeezed_top1: Mapping[str, float],
    images: str = DISTILLED,
) -> None:
    """Write provenance.json: versions, teachers, seeds, fingerprint, and the SHA-256 of tables and recipe.

    Holds no time, host name or path: the same recipe gives the same bytes.
    """
    roles = {
        "logit": [recipe.teachers.logit],
        "bn_pool": list(recipe.teachers.bn_pool),
        "relabel": list(recipe.relabel.teachers),
        "verifier": [recipe.teachers.verifier] if recipe.teachers.verifier else [],
    }
    described = [
        {
            "name": name,
            "roles": [role for role, names in roles.items() if name in names],
            "architecture": t.architecture,
            "revision": t.revision,
            "licence": t.licence,
            "weights_sha256": t.weights_sha256,
            "test_top1": squeezed_top1.get(name),
        }
        for name, t in teachers.items()
    ]
    write_json(
        folder / "provenance.json",
        {
            "format_version": FORMAT_VERSION,
            "recipe": recipe.name,
            "images": images,
            "recipe_fingerprint": recipe.fingerprint(),
            "seed": recipe.seed,
            "student_seeds": list(recipe.evaluation.seeds),
            "source": {
                "id": recipe.data.source,
                "on_hub": source_on_hub,
                "revision": source_revision,
                "licence": recipe.data.licence,
            },
            "teachers": described,
            "versions": versions(),
            "hardware": dict(hardware),
            "files": {path.relative_to(folder).as_posix(): _vouched(path) for path in data_files(folder)},
        },
    )


def _vouched(path: Path) -> dict[str, object]:
    """What provenance.json says of one file."""
    rows = {"rows": pq.read_metadata(path).num_rows} if path.suffix == ".parquet" else {}
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size, **rows}


def data_files(folder: Path) -> list[Path]:
    """Files that provenance.json vouches for: all but itself, the card, its pictures and hidden files."""
    own = ("provenance.json", "README.md")
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    parts = ((p, p.relative_to(folder).parts) for p in found)
    return [p for p, part in parts if part[0] not in (*own, "assets") and not any(name.startswith(".") for name in part)]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
