"""Teachers from transformers."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import TeacherError
from ..runtime import Facts
from .download import ADAPTER, CONFIG, INDEX, WEIGHTS, ModelFiles, ShardIndex
from .teacher import StatedInput, Teacher, cannot_load, check_links, digest_of_tensors


class LogitsOnly(nn.Module):
    """A transformers classifier with timm's calling convention: images (B, C, H, W) -> logits (B, K)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(pixel_values=x).logits


class _Config(Facts):
    """A config.json of transformers, as far as it is read here; `pretrained_cfg` is that of a wrapped timm model."""

    pretrained_cfg: dict[str, object] | None = None
    model_args: dict[str, object] | None = None


def from_transformers(files: ModelFiles, name: str) -> Teacher:
    """Load a classifier of transformers, with the normalization of its image processor."""
    wrapped = _check_folder(files.folder, name).pretrained_cfg or {}
    model, processor = _open(files.folder, name)
    config = model.config
    size, mean, std = _input_of(processor, getattr(config, "num_channels", 3), name)
    labels = [config.id2label.get(i, f"LABEL_{i}") for i in range(config.num_labels)]
    generic = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    return Teacher(
        name=name,
        model=LogitsOnly(model),
        mean=mean,
        std=std,
        size=size,
        num_classes=int(config.num_labels),
        architecture=str(getattr(config, "architecture", None) or config.model_type),
        licence=str(wrapped.get("license") or files.licence or "unknown"),
        revision=files.commit,
        weights_sha256=digest_of_tensors(model.state_dict()),
        label_names=None if generic else tuple(labels),
    )


def _check_folder(folder: Path, name: str) -> _Config:
    """Refuse a folder that would open more than its own safetensors."""
    check_links(folder, name)
    try:
        config = _Config.read(folder / CONFIG)
        if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
            ShardIndex.read(folder / INDEX)
    except ValueError as error:
        raise cannot_load(name, error) from error
    # What is called model_args reaches timm's own loader of checkpoints, pickles among them.
    if "checkpoint_path" in (config.model_args or {}):
        raise TeacherError(
            f"teacher {name!r}: its config.json names a checkpoint of its own; only model.safetensors is opened"
        )
    if (folder / ADAPTER).is_file():
        raise TeacherError(f"teacher {name!r} adapts another model ({ADAPTER}); merge the two and save the whole model")
    return config


def _open(folder: Path, name: str) -> tuple[Any, object]:
    """Open model and image processor, and refuse weights that transformers would complete with random numbers."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **local
        )
        processor = AutoImageProcessor.from_pretrained(folder, **local)
    except Exception as error:  # a foreign config.json reaches constructors as keyword arguments: anything can follow
        raise cannot_load(name, error) from error
    if absent := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        raise TeacherError(
            f"teacher {name!r}: its weights lack {len(absent)} tensors of the model, {absent[0]!r} first; "
            "use a checkpoint trained to classify images"
        )
    return model, processor


def _input_of(processor: object, channels: int, name: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side, mean and std that an image processor prepares, in [0, 1] pixel units; one that does more is refused."""
    scale = getattr(processor, "rescale_factor", None)
    if getattr(processor, "do_flip_channel_order", False) or (scale is not None and abs(scale * 255 - 1) > 1e-6):
        raise TeacherError(
            f"teacher {name!r} wants its channels or pixel values in another order or scale than RGB in [0, 1]; "
            "use the model through timm, or another teacher"
        )
    values = getattr(processor, "data_config", None)  # of a timm model in its wrapper
    if values is None:
        crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
        size = crop or getattr(processor, "size", None) or {}
        side = next((size[key] for key in ("height", "shortest_edge") if key in size and size[key]), None)
        plain = not getattr(processor, "do_normalize", True)
        mean, std = ([0.0] * channels, [1.0] * channels) if plain else (processor.image_mean, processor.image_std)  # type: ignore[attr-defined]
        values = {"input_size": side and [channels, side, side], "mean": mean, "std": std}
    try:
        stated = StatedInput.parse(json.dumps(values).encode(), "its image processor")
    except ValueError as error:
        raise TeacherError(f"teacher {name!r}: {error}") from error
    if stated.input_size is None or stated.mean is None or stated.std is None:
        raise TeacherError(f"teacher {name!r}: its image processor states no input size; use the model through timm")
    return stated.input_size[-1], tuple(stated.mean), tuple(stated.std)
