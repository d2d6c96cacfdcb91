"""Export a distilled dataset in the layouts of other programs: class folders, the columns of rethinkdc, or tensors."""

import io
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from ..errors import DataError, OutputError
from ..images import UNREADABLE, decode, encode
from ..runtime import draft_folder, write_bytes, write_json, writing
from .tables import Table, dataset_folder, open_images

ExportFormat = Literal["imagefolder", "rethinkdc", "ddranking"]

EXTENSIONS = {"PNG": "png", "WEBP": "webp", "JPEG": "jpg"}
LONGEST_NAME = 80
# `datasets` treats any folder with such a word in its name as a split, at any depth.
SPLIT_WORD = re.compile(
    r"(?:^|[-._0-9])(?:train|training|test|testing|eval|evaluation|validation|valid|val|dev)(?:$|[-._0-9])", re.IGNORECASE
)

RETHINKDC_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
---
Images and class indices of a distilled dataset, in the columns that rethinkdc reads. Soft labels are not included.
"""

DDRANKING_CARD = """# Tensors for DD-Ranking

{ipc} images of each of {classes} classes, class by class, with one soft label (logits) per image.
`mean` and `std` are those that DD-Ranking uses for its real data, such as CIFAR-10.

```python
from safetensors.torch import load_file
from torchvision.transforms.functional import normalize

tensors = load_file("tensors.safetensors")
images = normalize(tensors["image_tensor"] / 255, mean, std)
evaluator.compute_metrics(image_tensor=images, soft_labels=tensors["soft_labels"])  # LabelRobustScoreSoft
evaluator.compute_metrics(image_tensor=images, hard_labels=tensors["hard_labels"])  # LabelRobustScoreHard
```

Its scores are computed from percentages, so they differ from those of prism-hf, which uses accuracies in [0, 1].
"""


class _Picture(NamedTuple):
    data: bytes
    label: int
    slot: int
    extension: str
    mode: str
    logits: list[float] | None


def export(source: str | Path, target: str | Path, *, format: ExportFormat, revision: str | None = None) -> Path:
    """Write a distilled dataset in a layout that other programs read; return the target folder.

    Only `ddranking` has soft labels, one per image. A student trained on another export learns from hard labels.

    - `imagefolder`: `train/<class>/<slot>.<ext>` for `torchvision.datasets.ImageFolder` and `load_dataset("imagefolder")`.
      Folder names start with the class index, so both loaders assign each class the same index as the dataset;
      classes.json has the original names. The image files are copied unchanged.
    - `rethinkdc`: one Parquet table with the columns `image` and `class_id`. Its transforms need three channels, so images
      that are not RGB become RGB PNGs; RGB images are copied unchanged. (Its command line reads Parquet only from a path
      that contains "he-y". From any other path it reads class folders, which `imagefolder` writes into `train`.)
    - `ddranking`: tensors.safetensors with the arguments of DD-Ranking's evaluators, class by class: `image_tensor`
      (N, 3, H, W) uint8, `soft_labels` (N, K) float32 (logits of the whole images) and `hard_labels` (N,) int64. The
      evaluators expect images that are divided by 255 and normalized like their real data (README.md of the export).

    Raises:
        OutputError: The target is not empty or cannot be written; no partial output remains.
        DataError: No such dataset or layout, a class without images, or an image that cannot be read.
        HubError: The Hub does not respond, or this token cannot access such a dataset.
    """
    if format not in _WRITERS:
        raise DataError(f"export format {format!r} is unknown; expected {' or '.join(_WRITERS)}")
    target = Path(target)
    _check_target(target, source)
    with dataset_folder(source, revision) as folder:
        images, names = open_images(folder)
    _check_slots(images, names, source)
    home = target.absolute()  # the path "." has neither name nor parent
    draft = draft_folder(home)
    try:
        with writing(target):
            _WRITERS[format](draft, _pictures(images, source, logits=format == "ddranking"), names)
            write_json(draft / "classes.json", {str(index): name for index, name in enumerate(names)})
            if home.exists():
                home.rmdir()  # it is empty; Windows cannot rename onto an existing folder
            draft.rename(home)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _check_target(target: Path, source: str | Path) -> None:
    if os.path.isdir(source) and target.resolve().is_relative_to(Path(source).resolve()):
        raise OutputError(f"{target} is inside the dataset {source}; give a folder outside of it")
    if os.path.isdir(target) and not target.is_symlink():
        if any(target.iterdir()):
            raise OutputError(f"{target} is not empty; give a folder that does not exist, or an empty one")
    elif os.path.lexists(target):
        raise OutputError(f"{target} is not a folder; give one that does not exist, or an empty one")


def _check_slots(table: Table, names: Sequence[str], source: str | Path) -> None:
    """Check that every class has images and each image its own slot, because both determine file names."""
    slots: Counter[tuple[int, int]] = Counter()
    for rows in table.batches(("label", "slot")):
        slots.update(zip(rows["label"].to_pylist(), rows["slot"].to_pylist(), strict=True))
    labels, expected = {label for label, _ in slots}, set(range(len(names)))
    if unknown := labels - expected:
        raise DataError(f"{str(source)!r} has an image of class {unknown.pop()}; expected 0 to {len(names) - 1}")
    if empty := sorted(expected - labels):
        name = names[empty[0]]
        raise DataError(f"{str(source)!r} has no image of class {name!r}; the next class would get its index")
    if duplicates := [key for key, count in slots.items() if count > 1]:
        label, slot = duplicates[0]
        raise DataError(f"{str(source)!r} has several images of class {names[label]!r} in slot {slot}; expected one")


def _pictures(table: Table, source: str | Path, *, logits: bool) -> Iterator[list[_Picture]]:
    """Yield the images of each row group, which is as many as may be in memory at a time."""
    for group in table.groups:
        columns = ("image", "label", "slot", *(("teacher_logits",) if logits else ()))
        rows = table.read(group.start, group.start + group.rows, columns).to_pylist()
        yield [_picture(cells, f"row {group.start + number} of {str(source)!r}") for number, cells in enumerate(rows)]


def _picture(cells: Mapping[str, Any], where: str) -> _Picture:
    try:
        data = cells["image"]["bytes"]
        with Image.open(io.BytesIO(data)) as picture:
            kind, mode = str(picture.format), picture.mode
    except (*UNREADABLE, TypeError) as error:
        reason = f"{where} has no readable image ({type(error).__name__}); package or download the dataset again"
        raise DataError(reason) from error
    if kind not in EXTENSIONS:
        raise DataError(f"{where} is {kind}; expected {', '.join(EXTENSIONS)}")
    return _Picture(data, cells["label"], cells["slot"], EXTENSIONS[kind], mode, cells.get("teacher_logits"))


def _write_imagefolder(folder: Path, groups: Iterable[list[_Picture]], names: Sequence[str]) -> None:
    homes = [folder / "train" / _folder_name(index, name, len(names)) for index, name in enumerate(names)]
    for home in homes:
        home.mkdir(parents=True)
    for picture in chain.from_iterable(groups):
        (homes[picture.label] / f"{picture.slot:05d}.{picture.extension}").write_bytes(picture.data)


def _folder_name(index: int, name: str, count: int) -> str:
    """Return the class index, which makes folders unique and ordered, plus the filesystem-safe part of the class name."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", plain)[:LONGEST_NAME].strip("._-")
    number = str(index).zfill(max(5, len(str(count - 1))))
    return number if not plain or SPLIT_WORD.search(plain) else f"{number}_{plain}"


def _write_rethinkdc(folder: Path, groups: Iterable[list[_Picture]], names: Sequence[str]) -> None:
    features = datasets.Features({"image": datasets.Image(), "class_id": datasets.Value("int64")})
    (folder / "data").mkdir()
    path = folder / "data" / "train-00000-of-00001.parquet"
    # Encoded images do not compress any further.
    with pq.ParquetWriter(path, features.arrow_schema, compression="none") as writer:
        for rows in groups:
            rgb = [p.data if p.mode == "RGB" else encode(decode(p.data, 3), "png") for p in rows]
            cells = [{"bytes": data, "path": None} for data in rgb]
            columns = {"image": cells, "class_id": [picture.label for picture in rows]}
            writer.write_table(pa.table(columns, schema=features.arrow_schema))
    write_bytes(folder / "README.md", RETHINKDC_CARD.encode())


def _write_ddranking(folder: Path, groups: Iterable[list[_Picture]], names: Sequence[str]) -> None:
    pictures = sorted(chain.from_iterable(groups), key=lambda picture: (picture.label, picture.slot))
    counts = set(Counter(picture.label for picture in pictures).values())
    if len(counts) > 1:  # its evaluators number the classes by position
        raise DataError(f"DD-Ranking expects equally many images in each class, got {min(counts)} to {max(counts)}")
    tensors = {
        "image_tensor": torch.stack([decode(picture.data, 3) for picture in pictures]),
        "soft_labels": torch.tensor([picture.logits for picture in pictures]),
        "hard_labels": torch.tensor([picture.label for picture in pictures]),
    }
    save_file(tensors, folder / "tensors.safetensors")
    write_bytes(folder / "README.md", DDRANKING_CARD.format(ipc=counts.pop(), classes=len(names)).encode())


_WRITERS: dict[str, Callable[[Path, Iterable[list[_Picture]], Sequence[str]], None]] = {
    "imagefolder": _write_imagefolder,
    "rethinkdc": _write_rethinkdc,
    "ddranking": _write_ddranking,
}
