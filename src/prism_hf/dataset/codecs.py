"""How the soft labels of views are stored as columns, and read back; docs/labels.md compares the codecs.

Legend: B views, K classes, k classes that are kept.

`int8` and `int4` have one scale and one offset per row, so that no view depends on another one. `topk` is that of FKD
(arXiv 2112.01528). `seed` stores no logits: `with_teachers` computes them again.
"""

from collections.abc import Mapping

import datasets
import numpy as np
from datasets import Value

from ..recipe import Codec, StoredLabels

_SCALED = '* rows["logit_scale"][:, None] + rows["logit_offset"][:, None]'
READING: dict[Codec, str] = {
    "float16": 'logits = rows["teacher_logits"]',
    "int8": f'logits = rows["logits_int8"] {_SCALED}',
    "int4": 'pairs = np.stack([rows["logits_int4"] & 15, rows["logits_int4"] >> 4], 2)\n'
    f"logits = pairs.reshape(len(pairs), -1)[:, :K] {_SCALED}",
    "topk": 'logits = np.repeat(rows["other_logit"][:, None], K, 1)\n'
    'np.put_along_axis(logits, rows["top_classes"], rows["top_logits"], 1)',
}
"""Code that reads the logits, (B, K), of a batch of rows in numpy format. The card and docs/labels.md show it."""

LEVELS = {"int8": 255, "int4": 15}


def label_features(codec: Codec, num_classes: int, top_k: int | None = None) -> dict[str, datasets.List | Value]:
    """Return the columns of a codec; `seed` has none."""

    def row(kind: str, length: int) -> datasets.List:
        return datasets.List(Value(kind), length=length)

    scaled = {"logit_scale": Value("float16"), "logit_offset": Value("float16")}
    match codec:
        case "float16":
            return {"teacher_logits": row("float16", num_classes)}
        case "int8":
            return {"logits_int8": row("uint8", num_classes), **scaled}
        case "int4":
            return {"logits_int4": row("uint8", -(-num_classes // 2)), **scaled}
        case "topk":
            assert top_k is not None
            classes = row("int16" if num_classes <= 2**15 else "int32", top_k)
            return {"top_logits": row("float16", top_k), "top_classes": classes, "other_logit": Value("float16")}
        case "seed":
            return {}


def codec_of(columns: Mapping[str, object]) -> Codec:
    """Return the codec of a table of views from its columns."""
    by_column: dict[str, Codec] = {
        "teacher_logits": "float16",
        "logits_int8": "int8",
        "logits_int4": "int4",
        "top_logits": "topk",
    }
    return next((codec for column, codec in by_column.items() if column in columns), "seed")


def encode_logits(logits: np.ndarray, labels: StoredLabels) -> dict[str, np.ndarray]:
    """Convert raw logits, (B, K) float16, to the columns of `label_features`; `decode_logits` is the inverse."""
    match labels.codec:
        case "float16":
            return {"teacher_logits": logits}
        case "int8":
            levels, scaled = _quantized(logits, LEVELS["int8"])
            return {"logits_int8": levels, **scaled}
        case "int4":
            levels, scaled = _quantized(logits, LEVELS["int4"])
            levels = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2)))
            return {"logits_int4": levels[:, ::2] | levels[:, 1::2] << 4, **scaled}
        case "topk":
            assert labels.top_k is not None
            return _top(logits.astype(np.float32), labels.top_k, labels.temperature)
        case "seed":
            return {}


def decode_logits(columns: Mapping[str, np.ndarray], num_classes: int) -> np.ndarray:
    """Return the raw logits of the columns of a codec, (B, K): float16 as stored, float32 if they were computed.

    For `topk`, all other classes share one logit. For `seed`, there are none, (B, 0).
    """
    match codec_of(columns):
        case "float16":
            return columns["teacher_logits"]
        case "int8":
            return _scaled(columns["logits_int8"], columns)
        case "int4":
            packed = columns["logits_int4"]
            levels = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
            return _scaled(levels[:, :num_classes], columns)
        case "topk":
            logits = np.repeat(columns["other_logit"].astype(np.float32)[:, None], num_classes, axis=1)
            kept, classes = columns["top_logits"].astype(np.float32), columns["top_classes"].astype(np.int64)
            np.put_along_axis(logits, classes, kept, axis=1)
            return logits
        case "seed":
            return np.empty((len(next(iter(columns.values()))), 0), np.float16)


def _quantized(logits: np.ndarray, highest: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return levels from 0 to `highest`, (B, K) uint8, and the scale and offset of each row, (B,) float16."""
    values = logits.astype(np.float32)
    low, high = values.min(1), values.max(1)
    # Rounded up, so that the highest logit does not exceed the last level.
    scale = np.nextafter(((high - low) / highest).astype(np.float16), np.float16(np.inf))
    # Rounding uses the scale as it is stored.
    levels = np.rint((values - low[:, None]) / scale.astype(np.float32)[:, None]).clip(0, highest)
    return levels.astype(np.uint8), {"logit_scale": scale, "logit_offset": low.astype(np.float16)}


def _scaled(levels: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    scale, offset = (columns[name].astype(np.float32)[:, None] for name in ("logit_scale", "logit_offset"))
    return levels * scale + offset


def _top(logits: np.ndarray, count: int, temperature: float) -> dict[str, np.ndarray]:
    """Keep the `count` highest logits; the other classes share the rest of the probability at this temperature (FKD)."""
    order = np.argsort(-logits, axis=1, kind="stable")
    kept, others = order[:, :count], order[:, count:]
    rest = np.take_along_axis(logits, others, axis=1) / temperature
    highest = rest.max(1, keepdims=True)
    shared = temperature * (highest[:, 0] + np.log(np.exp(rest - highest).mean(1)))
    return {
        "top_logits": np.take_along_axis(logits, kept, axis=1).astype(np.float16),
        "top_classes": kept.astype(np.int16 if logits.shape[1] <= 2**15 else np.int32),
        "other_logit": shared.astype(np.float16),
    }
