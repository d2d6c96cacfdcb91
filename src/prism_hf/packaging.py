"""How a distilled data set is stored and read: a folder that plain `datasets` loads, streams and explains.

    data/train-*.parquet    config "default": image, label, slot, teacher_logits, job
    views/train-*.parquet   config "views": one row per image and epoch, with its label; sorted by epoch
    recipe.yaml, provenance.json, README.md, assets/

docs/dataset_format.md is the contract. No pickles, no scripts.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from torch import Tensor

from .errors import DataError
from .pixels import decode
from .recipe import Recipe, dump_recipe, load_recipe
from .storage import sha256_of, write_bytes, write_json, write_whole
from .teachers import Teacher
from .views import ViewRows, from_columns

FORMAT_VERSION = 1
VIEWS = "views"
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
    hardware: Mapping[str, object],
    squeezed_top1: Mapping[str, float],
) -> None:
    """Write provenance.json: versions, teachers, seeds, fingerprint, and the SHA-256 of every other file but README.md.

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
            "name": _without_path(t.name),
            "roles": [role for role, names in roles.items() if t.name in names],
            "architecture": t.architecture,
            "revision": t.revision,
            "licence": t.licence,
            "weights_sha256": t.weights_sha256,
            "test_top1": squeezed_top1.get(t.name),
        }
        for t in teachers.values()
    ]
    write_json(
        folder / "provenance.json",
        {
            "format_version": FORMAT_VERSION,
            "recipe": recipe.name,
            "recipe_fingerprint": recipe.fingerprint(),
            "seed": recipe.seed,
            "student_seeds": list(recipe.evaluation.seeds),
            "source": {
                "id": Path(recipe.data.source).name if Path(recipe.data.source).is_absolute() else recipe.data.source,
                "revision": source_revision,
                "licence": recipe.data.licence,
            },
            "teachers": described,
            "versions": versions(),
            "hardware": dict(hardware),
            "files": {
                str(path.relative_to(folder).as_posix()): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
                for path in data_files(folder)
            },
        },
    )


def _without_path(name: str) -> str:
    """A teacher's name for the public: of a local folder only its last part."""
    scheme, colon, place = name.partition(":")
    return f"{scheme}:{Path(place).name}" if colon and Path(place).is_absolute() else name


def data_files(folder: Path) -> list[Path]:
    """Files that provenance.json vouches for: all but itself, the card, its pictures and hidden files."""
    own = ("provenance.json", "README.md")
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    parts = ((p, p.relative_to(folder).parts) for p in found)
    return [p for p, part in parts if part[0] not in (*own, "assets") and not any(name.startswith(".") for name in part)]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


@dataclass(frozen=True, eq=False)
class DistilledDataset:
    """A distilled data set in memory; its views are read one epoch at a time.

    Attributes:
        images_uint8: (N, C, H, W).
        labels: (N,) int64.
        class_names: K.
        teacher_logits: Raw logits of the images themselves, (N, K) float16.
        num_epochs: Epochs of views.
        epoch: Number of an epoch -> its views and their raw logits, (N, K) float16.
        image_bytes: Bytes of the encoded images.
        label_bytes: Bytes of everything else in the two tables' files.
        recipe: The recipe in the folder, or `None`.
    """

    images_uint8: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    teacher_logits: Tensor
    num_epochs: int
    epoch: Callable[[int], tuple[ViewRows, Tensor]]
    image_bytes: int
    label_bytes: int
    recipe: Recipe | None


def load_distilled(source: str | Path, *, revision: str | None = None, channels: int | None = None) -> DistilledDataset:
    """Load a data set folder or a Hub data set of our format.

    Args:
        source: Folder, or Hub id.
        revision: Of a Hub data set.
        channels: 1 or 3; by default what the recipe in the folder says, else what the first image has.

    Raises:
        DataError: Not found, or not of this format; one line.

    Example:
        >>> load_distilled("outputs/digits-prism-ipc10/dataset").images_uint8.shape
        torch.Size([100, 1, 32, 32])
    """
    images = _load(source, "default", revision)
    views = _load(source, VIEWS, revision)
    missing = set(view_features(2)) - set(views.column_names) | (set(image_features(["a", "b"])) - set(images.column_names))
    if missing:
        raise DataError(f"{str(source)!r} is no distilled data set of this format: no column {', '.join(sorted(missing))}")
    recipe = _load_shipped_recipe(source, revision)
    raw = images.cast_column("image", datasets.Image(decode=False))
    encoded = [cell["bytes"] for cell in raw["image"]]
    if channels is None:
        channels = recipe.data.channels if recipe else _channels(images)
    count = len(images)
    if not count or len(views) % count:
        raise DataError(f"{str(source)!r}: {len(views)} views of {count} images; expected whole epochs")
    image_bytes = sum(map(len, encoded))
    sizes = [images.info.download_size or 0, views.info.download_size or 0]
    return DistilledDataset(
        images_uint8=torch.stack([decode(data, channels) for data in encoded]),
        labels=torch.tensor(images["label"][:]),
        class_names=tuple(images.features["label"].names),
        teacher_logits=torch.from_numpy(_matrix(images.with_format("arrow")[:]["teacher_logits"])),
        num_epochs=len(views) // count,
        epoch=_epoch_reader(views, count),
        image_bytes=image_bytes,
        label_bytes=max(0, sum(sizes) - image_bytes),
        recipe=recipe,
    )


def _load(source: str | Path, config: str, revision: str | None) -> datasets.Dataset:
    path = Path(source)
    try:
        return datasets.load_dataset(str(source), config, split="train", revision=None if path.is_dir() else revision)
    except (ValueError, OSError, RuntimeError, httpx2.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"distilled data set {str(source)!r}, config {config!r}, cannot be loaded ({type(error).__name__}: {reason}); "
            "give a folder with data/, views/ and README.md, or a Hub id"
        ) from error


def _load_shipped_recipe(source: str | Path, revision: str | None) -> Recipe | None:
    if Path(source).is_dir():
        path = Path(source) / "recipe.yaml"
        return load_recipe(path) if path.is_file() else None
    try:
        return load_recipe(hf_hub_download(str(source), "recipe.yaml", repo_type="dataset", revision=revision))
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise DataError(f"recipe.yaml of {str(source)!r} cannot be fetched: {type(error).__name__}") from error


def _channels(images: datasets.Dataset) -> int:
    return 1 if images[0]["image"].mode in ("L", "1", "I;16") else 3


def _epoch_reader(views: datasets.Dataset, count: int) -> Callable[[int], tuple[ViewRows, Tensor]]:
    arrow = views.with_format("arrow")

    def read(epoch: int) -> tuple[ViewRows, Tensor]:
        table: Any = arrow[epoch * count : (epoch + 1) * count]
        columns = {
            name: _matrix(table[name]) if pa.types.is_fixed_size_list(table[name].type) else table[name].to_numpy()
            for name in table.column_names
        }
        return from_columns(columns), torch.from_numpy(columns["teacher_logits"])

    return read


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    width = column.type.list_size
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, width).copy()
