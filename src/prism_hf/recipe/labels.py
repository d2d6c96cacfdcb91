"""Storage of soft labels: the codecs, their sizes, and the choice that a budget in bytes makes."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from ..runtime import size_text

Codec = Literal["float16", "int8", "int4", "topk", "seed"]

VIEW_ROW_BYTES = 32
"""Bytes of one view in addition to its logits: two crops, a mix box, indices and flags (before compression)."""
_FILE_BYTES, _ROW_BYTES = 12 * 2**10, 4
"""Upper bounds of the metadata of a Parquet file with one row group, and for each row of further ones."""
_BY_SIZE: tuple[Codec, ...] = ("float16", "int8", "int4")
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _size(text: str) -> str:
    if not re.fullmatch(rf"\d+(\.\d+)? ?({'|'.join(_UNITS)})", text):
        raise ValueError(f"must be a size such as 150MB, got {text!r}; units are {', '.join(_UNITS)}")
    return text


Size = Annotated[str, AfterValidator(_size)]
"""A number of bytes with a decimal unit, such as `150MB`."""


@dataclass(frozen=True)
class StoredLabels:
    """How the soft labels of views are stored, and for how many epochs.

    `temperature` is that of the student's loss: `topk` keeps the probabilities at this temperature.
    """

    codec: Codec
    epochs: int
    top_k: int | None
    temperature: float

    def row_bytes(self, num_classes: int) -> int:
        """Return the bytes of a view and its label before compression."""
        return VIEW_ROW_BYTES + _label_bytes(self.codec, num_classes, self.top_k or 0)


def _label_bytes(codec: Codec, num_classes: int, top_k: int) -> int:
    """Return the bytes of one label. Scale, offset and the logits and classes of `topk` take two bytes each."""
    sizes = {
        "float16": 2 * num_classes,
        "int8": num_classes + 4,
        "int4": -(-num_classes // 2) + 4,
        "topk": 4 * top_k + 2,
        "seed": 0,
    }
    return sizes[codec]


def within_budget(budget: str, *, images: int, num_classes: int, epochs: int, temperature: float) -> StoredLabels:
    """Return the codec and the number of stored epochs that fit a budget for the files of views.

    The measured order (docs/labels.md): eight bits cost no accuracy, four bits hardly any, and both cost less than fewer
    epochs. So all epochs are kept if `float16`, `int8` or `int4` permits; otherwise, `int4` with as many as fit.

    Raises:
        ValueError: Not even one epoch fits.
    """
    allowed = float(re.sub("[^0-9.]", "", budget)) * _UNITS[budget[-2:]]
    for codec in _BY_SIZE:
        fitting = StoredLabels(codec, epochs, None, temperature)
        per_epoch = images * (fitting.row_bytes(num_classes) + _ROW_BYTES)
        count = int((allowed - _FILE_BYTES) // per_epoch)
        if count >= epochs:
            return fitting
    if count < 1:
        raise ValueError(
            f"relabel.budget {budget} does not hold one epoch of labels; {images:,} images of {num_classes} classes need "
            f"{size_text(per_epoch + _FILE_BYTES)} with int4, the smallest codec; raise it, or remove it"
        )
    return StoredLabels(codec, count, None, temperature)
