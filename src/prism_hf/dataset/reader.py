"""Read a distilled dataset from a folder or the Hub, to train students on, in memory that does not grow with its size.

Legend: N images, B rows, C channels, H x W pixels, K classes.
"""

import hashlib
import io
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError
from ..images import UNREADABLE, ViewRows, decode, from_columns
from ..recipe import Codec, Recipe, load_recipe
from .codecs import codec_of, decode_logits
from .format import VIEWS, view_features
from .provenance import Provenance, read_provenance
from .tables import Table, dataset_folder, open_images, to_arrays

_IN_MEMORY = 2**23
"""Larger arrays (in bytes) are mapped from a file, so that the kernel can drop their pages when memory is short."""
_PICTURES_AT_ONCE = 32
_GEOMETRY = view_features(2, "seed")
"""The columns of views without those of their labels."""


@dataclass(frozen=True, eq=False)
class DistilledDataset:
    """A distilled dataset whose large parts stay in files and are read on access.

    Attributes:
        images_uint8: Images, (N, C, H, W) uint8.
        labels: Class indices, (N,) int64.
        teacher_logits: Raw logits of the images themselves, (N, K) float16.
        views: Function of an epoch number and a range (step 1) of its N rows. Returns those views and their raw logits,
            (B, K) float16 or float32, and reads only the row groups that contain them. With codec `seed`, there are no
            logits, (B, 0), until `with_teachers` computes them.
        codec: How the logits of the views are stored.
        image_bytes: Size of the encoded images in bytes.
        label_bytes: Size of everything else in the files of the two tables, in bytes.
        content: Sixteen hex digits of a hash over images, labels and all views; equal for equal datasets.
        teacher_weights: SHA-256 of each teacher's weights, from provenance.json.
        image_label_bytes: Compressed size of `teacher_logits` in bytes; `None` for a dataset that is not in files.
        view_bytes: Compressed bytes of the row groups with the first 0, 1, 2, ... epochs of views; `None` as above. A row
            group is read as a whole, so all of it counts if any row is needed.
    """

    images_uint8: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    teacher_logits: Tensor
    num_epochs: int
    views: Callable[[int, range], tuple[ViewRows, Tensor]]
    image_bytes: int
    label_bytes: int
    recipe: Recipe | None
    content: str
    codec: Codec = "float16"
    teacher_weights: Mapping[str, str] = field(default_factory=dict)
    image_label_bytes: int | None = None
    view_bytes: Sequence[int] | None = None

    def epoch(self, number: int) -> tuple[ViewRows, Tensor]:
        """Return all views of an epoch and their raw logits, (N, K) float16 or float32."""
        return self.views(number, range(len(self.labels)))


def load_distilled(source: str | Path, *, revision: str | None = None, channels: int | None = None) -> DistilledDataset:
    """Load a distilled dataset from a folder or the Hub.

    Args:
        source: Folder or Hub id. For a Hub id, the tables, recipe and provenance are downloaded into the Hub cache.
        revision: Branch, tag or commit of a Hub dataset.
        channels: 1 or 3; defaults to the value in the folder's recipe, or else to the channels of the first image.

    Raises:
        DataError: The dataset has another format or is incomplete, or there is no disk space for the decoded images.
        HubError: The Hub does not respond, or this token cannot access such a dataset.

    Example:
        >>> load_distilled("outputs/digits-prism-ipc10/dataset").images_uint8.shape
        torch.Size([100, 1, 32, 32])
    """
    with dataset_folder(source, revision) as folder:
        return _load(folder, channels)


def _load(folder: Path, channels: int | None) -> DistilledDataset:
    images, class_names = open_images(folder)
    views = Table(folder, VIEWS)
    path = folder / "recipe.yaml"
    recipe = load_recipe(path) if path.is_file() else None
    codec, columns = _label_columns(views, len(class_names), recipe)
    count = images.num_rows
    if not count or not views.num_rows or views.num_rows % count:
        raise DataError(f"table {VIEWS!r} has {views.num_rows} rows for {count} images; expected whole epochs")
    provenance = folder / Provenance.FILE
    teachers = read_provenance(provenance).teachers if provenance.is_file() else []
    content, image_bytes = _content(images, views, columns, len(class_names))
    if channels is None:
        channels = recipe.data.channels if recipe else _channels(next(_encoded(images))[0])

    def column(name: str) -> Iterator[np.ndarray]:
        return (to_arrays(batch)[name] for batch in images.batches((name,)))

    def views_of(epoch: int, rows: range) -> tuple[ViewRows, Tensor]:
        arrays = to_arrays(views.read(epoch * count + rows.start, epoch * count + rows.stop, columns))
        return from_columns(arrays), torch.from_numpy(decode_logits(arrays, len(class_names)).copy())

    num_epochs = views.num_rows // count
    sizes = list(zip((group.start for group in views.groups), views.compressed_bytes(columns), strict=True))
    return DistilledDataset(
        images_uint8=_joined(_decoded(images, channels), count),
        labels=_joined(column("label"), count),
        class_names=class_names,
        teacher_logits=_joined(column("teacher_logits"), count),
        num_epochs=num_epochs,
        views=views_of,
        image_bytes=image_bytes,
        label_bytes=images.file_bytes + views.file_bytes - image_bytes,
        recipe=recipe,
        content=content,
        codec=codec,
        teacher_weights={teacher.name: teacher.weights_sha256 for teacher in teachers},
        image_label_bytes=sum(images.compressed_bytes(("teacher_logits",))),
        view_bytes=[sum(size for start, size in sizes if start < epochs * count) for epochs in range(num_epochs + 1)],
    )


def _label_columns(views: Table, classes: int, recipe: Recipe | None) -> tuple[Codec, tuple[str, ...]]:
    """Check the columns of views; return the codec of their labels, and the names of all columns."""
    codec = codec_of(views.features)
    length = getattr(views.features.get("top_logits"), "length", None)
    if codec == "seed" and (recipe is None or recipe.stored_labels.codec != "seed"):
        codec = "float16"  # whose column is missing
    expected = view_features(classes, codec, length)
    views.check_columns(expected)
    return codec, tuple(expected)


def _content(images: Table, views: Table, columns: Sequence[str], classes: int) -> tuple[str, int]:
    """Check every value of a dataset; return its content hash and the total size of its encoded images in bytes.

    The hash covers the images in order, followed by the columns of each batch of rows of the two tables.
    """
    digest, size = hashlib.sha256(), 0
    for blob in chain.from_iterable(_encoded(images)):
        digest.update(hashlib.sha256(blob).digest())
        size += len(blob)
    count = images.num_rows
    ranges = {"label": range(classes), "image_index": range(count), "mix_image_index": range(-1, count)}
    ranges["top_classes"] = range(classes)
    for batch in chain(images.batches(("label", "slot", "teacher_logits", "job")), views.batches(columns)):
        for name, values in to_arrays(batch).items():
            expected = ranges.get(name)
            if expected is not None and (values.min() < expected.start or values.max() >= expected.stop):
                raise DataError(f"column {name} has values outside of {expected.start} to {expected.stop - 1}")
            if name not in ("slot", "job"):  # these identify an image; a student never sees them
                digest.update(values.ravel().data)
    return digest.hexdigest()[:16], size


def _encoded(images: Table) -> Iterator[list[bytes]]:
    """Yield the bytes of all image files, a few at a time."""
    for start in range(0, images.num_rows, _PICTURES_AT_ONCE):
        cells = images.read(start, start + _PICTURES_AT_ONCE, ("image",))["image"]
        blobs = [blob or b"" for blob in pc.struct_field(cells, "bytes").to_pylist()]
        if b"" in blobs:
            raise DataError(f"row {start + blobs.index(b'')} has no image; package or download the dataset again")
        yield blobs


def _decoded(images: Table, channels: int) -> Iterator[np.ndarray]:
    """Yield all images, a few at a time, (B, C, H, W) uint8."""
    shape = None
    with ThreadPoolExecutor() as pool:
        for blobs in _encoded(images):
            pictures = list(pool.map(decode, blobs, [channels] * len(blobs)))
            shape = shape or pictures[0].shape
            if differing := [picture.shape for picture in pictures if picture.shape != shape]:
                raise DataError(f"it has images of shapes {tuple(shape)} and {tuple(differing[0])}; expected one shape")
            yield torch.stack(pictures).numpy()


def _channels(blob: bytes) -> int:
    try:
        with Image.open(io.BytesIO(blob)) as picture:
            return 1 if picture.mode in ("L", "1", "I;16") else 3
    except UNREADABLE as error:
        raise DataError(f"the first image cannot be decoded ({error}); package or download the dataset again") from error


def _joined(parts: Iterable[np.ndarray], count: int) -> Tensor:
    """Join parts with `count` rows in total into one tensor, in memory if it is small, or else mapped from an unnamed file.

    The file is in the cache of `datasets`, because /tmp may be in memory. It has no name, so a killed process leaves no
    file behind. It is written before it is mapped: a full disk then raises an error, while a map would crash the process.
    """
    source = iter(parts)
    first = next(source)
    shape, folder = (count, *first.shape[1:]), Path(datasets.config.HF_DATASETS_CACHE)
    size = math.prod(shape) * first.itemsize
    if size <= _IN_MEMORY:
        return torch.from_numpy(np.concatenate([first, *source]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for part in chain([first], source):
                file.write(np.ascontiguousarray(part).data)
            file.flush()
            os.fsync(file.fileno())  # a network disk reports only here that it is full
            return torch.from_numpy(np.memmap(file, first.dtype, "r+", shape=shape))
    except OSError as error:
        raise DataError(
            f"cannot write {size / 1e6:.0f} MB of decoded images or logits to {folder} ({error.strerror or error}); "
            "free some space, or set HF_DATASETS_CACHE to a folder on another disk"
        ) from error
