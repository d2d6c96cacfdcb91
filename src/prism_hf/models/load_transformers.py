"""Teachers from transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import TeacherError
from .download import ADAPTER, CONFIG, INDEX, WEIGHTS, fetch, shard_names
from .teacher import LOAD_ERRORS, Teacher, cannot_load, check_input, check_links, state_sha256

TRANSFORMERS_PREFIX = "transformers:"


class LogitsOnly(nn.Module):
    """A transformers classifier with timm's calling convention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, K)."""
        return self.model(pixel_values=x).logits


def from_transformers(name: str) -> Teacher:
    """A classifier of transformers, with the normalization of its image processor."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    source = name.removeprefix(TRANSFORMERS_PREFIX)
    hub = None if os.path.isdir(source) else fetch(name, source, weights=(WEIGHTS, INDEX))
    folder = hub.folder if hub else Path(source)
    _check_transformers_folder(folder, name)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **local
        )
        processor = AutoImageProcessor.from_pretrained(folder, **local)
    except LOAD_ERRORS as error:
        raise cannot_load(name, error) from error
    if absent := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        # transformers would fill them with random numbers.
        raise TeacherError(
            f"teacher {name!r}: its weights lack {len(absent)} tensors of the model, {absent[0]!r} first; "
            "use a checkpoint trained to classify images"
        )
    config = model.config
    timm_cfg = getattr(config, "pretrained_cfg", None)
    size, mean, std = (
        (timm_cfg["input_size"][-1], timm_cfg["mean"], timm_cfg["std"]) if timm_cfg else _input_of(processor, name)
    )
    check_input(name, [getattr(config, "num_channels", 3), size, size], mean, std)
    labels = [config.id2label.get(i, f"LABEL_{i}") for i in range(config.num_labels)]
    generic = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    return Teacher(
        name=name,
        model=LogitsOnly(model),
        mean=tuple(mean),
        std=tuple(std),
        size=int(size),
        num_classes=int(config.num_labels),
        architecture=str(getattr(config, "architecture", None) or config.model_type),
        licence=str((timm_cfg or {}).get("license") or (hub and hub.licence) or "unknown"),
        revision=hub.commit if hub else None,
        weights_sha256=state_sha256(model),
        label_names=None if generic else tuple(labels),
    )


def _check_transformers_folder(folder: Path, name: str) -> None:
    check_links(folder, name)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise cannot_load(name, error) from error
    # What is called model_args reaches timm's own loader of checkpoints, pickles among them.
    if isinstance(config, dict) and "checkpoint_path" in (config.get("model_args") or {}):
        raise TeacherError(
            f"teacher {name!r}: its config.json names a checkpoint of its own; only model.safetensors is opened"
        )
    if (folder / ADAPTER).is_file():
        raise TeacherError(f"teacher {name!r} adapts another model ({ADAPTER}); merge the two and save the whole model")
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        try:
            shard_names(folder / INDEX)
        except (OSError, ValueError) as error:
            raise cannot_load(name, error) from error


def _input_of(processor: object, name: str) -> tuple[int, Sequence[float], Sequence[float]]:
    """Side, mean and std that a transformers image processor prepares, in [0, 1] pixel units.

    Raises:
        TeacherError: It does something else to pixels (another channel order or scale), or states no size.
    """
    scale = getattr(processor, "rescale_factor", None)
    if getattr(processor, "do_flip_channel_order", False) or (scale is not None and abs(scale * 255 - 1) > 1e-6):
        raise TeacherError(
            f"teacher {name!r} wants its channels or pixel values in another order or scale than RGB in [0, 1]; "
            "use the model through timm, or another teacher"
        )
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    stated = crop or getattr(processor, "size", None) or {}
    sides = [stated[key] for key in ("height", "shortest_edge") if key in stated and stated[key]]
    if not sides:
        raise TeacherError(f"teacher {name!r}: its image processor states no input size; use the model through timm")
    if not getattr(processor, "do_normalize", True):
        return sides[0], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return sides[0], processor.image_mean, processor.image_std  # type: ignore[attr-defined]
