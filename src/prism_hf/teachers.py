"""Who teaches: image classifiers by name, frozen, each with its own normalisation, input size and licence.

Legend: B images, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .errors import TeacherError
from .pixels import reference_mean_std
from .recipe import SQUEEZE_PREFIX

LOCAL_PREFIX = "local-dir:"
TRANSFORMERS_PREFIX = "transformers:"


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen classifier and what it expects of its input.

    Attributes:
        name: As in the recipe.
        model: (B, 3 or 1, H, W) in its own normalisation -> logits (B, K); eval mode, no parameter gradients.
        mean: Per channel, in [0, 1] pixel units.
        std: Per channel, in [0, 1] pixel units.
        size: Side of its input in pixels.
        num_classes: K.
        architecture: timm or transformers architecture.
        licence: Of the weights, or "unknown".
        revision: Hub commit of the weights, or `None` for local ones.
        weights_sha256: Of all parameters and buffers.
        label_names: The teacher's own class names, if it says.
    """

    name: str
    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    num_classes: int
    architecture: str
    licence: str
    revision: str | None
    weights_sha256: str
    label_names: tuple[str, ...] | None

    def prepare(self, images: Tensor) -> Tensor:
        """Reference normalisation, (B, C, H, W) -> this teacher's own normalisation, channels and size.

        Grey images are copied to the channels the teacher has; the gradient of the copies adds up.
        """
        reference_mean, reference_std = reference_mean_std(images.shape[1], like=images)
        mean, std = (torch.tensor(v).to(images).view(1, -1, 1, 1) for v in (self.mean, self.std))
        x = torch.addcmul((reference_mean - mean) / std, images, reference_std / std)
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        return x.contiguous(memory_format=torch.channels_last)

    def logits(self, images: Tensor) -> Tensor:
        """Images in the reference normalisation, (B, C, H, W) -> raw logits, (B, K)."""
        return self.model(self.prepare(images))


def load_teachers(
    names: Sequence[str], *, device: torch.device, squeezed: Mapping[str, Path] | None = None
) -> dict[str, Teacher]:
    """Load each named teacher once.

    Args:
        names: `squeeze:arch`, a timm name, `hf-hub:org/name@revision`, `local-dir:path` or `transformers:org/name`.
        device: Where the networks go.
        squeezed: Folder of each `squeeze:` teacher.

    Raises:
        TeacherError: One line that names the teacher that cannot be loaded, and why.
    """
    return {name: load_teacher(name, device=device, squeezed=squeezed) for name in dict.fromkeys(names)}


def load_teacher(name: str, *, device: torch.device, squeezed: Mapping[str, Path] | None = None) -> Teacher:
    """Load one teacher; see `load_teachers`."""
    # The libraries initialise weights at random before they load them.
    with torch.random.fork_rng(devices=[]):
        loaded = _load(name, squeezed or {})
    loaded.model.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return loaded


def _load(name: str, squeezed: Mapping[str, Path]) -> Teacher:
    if name.startswith(SQUEEZE_PREFIX):
        folder = squeezed.get(name)
        if folder is None:
            raise TeacherError(f"teacher {name!r} is not trained yet; run recipes/squeeze.py on the recipe first")
        return _from_timm(f"{LOCAL_PREFIX}{folder}", name)
    if name.startswith(TRANSFORMERS_PREFIX):
        return _from_transformers(name)
    return _from_timm(name, name)


def check_teacher(teacher: Teacher, *, class_names: Sequence[str], channels: int) -> None:
    """Compare a teacher with the data it is to teach.

    Raises:
        TeacherError: Another class count, the same labels in another order, or too few input channels.
    """
    if teacher.num_classes != len(class_names):
        raise TeacherError(
            f"teacher {teacher.name!r} has {teacher.num_classes} classes, the data have {len(class_names)}; "
            "use a teacher of this data set, or squeeze one"
        )
    if len(teacher.mean) < channels:
        raise TeacherError(
            f"teacher {teacher.name!r} takes {len(teacher.mean)} channel(s), the data have {channels}; set data.channels"
        )
    names = teacher.label_names
    if names is not None and set(names) == set(class_names) and tuple(names) != tuple(class_names):
        first = next(i for i, (a, b) in enumerate(zip(names, class_names, strict=True)) if a != b)
        raise TeacherError(
            f"teacher {teacher.name!r} lists its labels in another order: class {first} is {names[first]!r} there and "
            f"{class_names[first]!r} in the data; reorder the data's ClassLabel, or use another teacher"
        )


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_LOAD_ERRORS = (RuntimeError, ValueError, OSError, KeyError, SafetensorError, HFValidationError, httpx2.HTTPError)


def _from_timm(source: str, name: str) -> Teacher:
    if source.startswith(LOCAL_PREFIX):
        _check_folder(Path(source.removeprefix(LOCAL_PREFIX)), name)
    elif not source.startswith(("hf-hub:", "hf_hub:")):
        _check_timm_name(source)
    try:
        model = timm.create_model(source, pretrained=True)
    except _LOAD_ERRORS as error:
        raise _cannot_load(name, error) from error
    config, cfg = resolve_model_data_config(model), model.pretrained_cfg
    labels = cfg.get("label_names")
    return Teacher(
        name=name,
        model=model,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=int(config["input_size"][-1]),
        num_classes=int(model.num_classes),
        architecture=str(cfg.get("architecture", source)),
        licence=str(cfg.get("license") or "unknown"),
        revision=_hub_commit(cfg.get("hf_hub_id")),
        weights_sha256=state_sha256(model),
        label_names=tuple(labels) if labels else None,
    )


def _check_timm_name(source: str) -> None:
    if ":" in source or "/" in source:
        raise TeacherError(
            f"teacher {source!r} is no timm name; other sources are squeeze:ARCH, hf-hub:ORG/NAME[@REVISION], "
            "local-dir:PATH and transformers:ORG/NAME"
        )
    if not timm.is_model(source.split(".")[0]):
        close = timm.list_models(f"{source.split('.')[0][:6]}*")[:4]
        hint = f"similar: {', '.join(close)}" if close else "timm.list_models() lists all"
        raise TeacherError(f"teacher {source!r}: timm knows no such architecture; {hint}")


def _check_folder(folder: Path, name: str) -> None:
    missing = [f for f in ("config.json", "model.safetensors") if not (folder / f).is_file()]
    if missing:
        raise TeacherError(
            f"teacher {name!r}: {folder} has no {' and no '.join(missing)}; expected a timm folder with config.json and "
            "model.safetensors (pickled weights are not loaded)"
        )
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise TeacherError(f"teacher {name!r}: {folder}/config.json does not name a timm architecture") from error


def _cannot_load(name: str, error: Exception) -> TeacherError:
    reason = " ".join(str(error).split())[:200]
    return TeacherError(
        f"teacher {name!r} could not be fetched or loaded ({type(error).__name__}: {reason}); "
        "check the name, the network and HF_HUB_OFFLINE, or use local-dir:PATH"
    )


def _hub_commit(repo: str | None) -> str | None:
    """The commit of the cached weights: the Hub cache keeps each in a folder named after it."""
    if not repo:
        return None
    repo = repo.partition("@")[0]
    for file in ("model.safetensors", "config.json", "pytorch_model.bin"):
        cached = try_to_load_from_cache(repo, file)
        if isinstance(cached, str):
            return Path(cached).parent.name
    return None


class _LogitsOnly(nn.Module):
    """A transformers classifier with timm's calling convention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def _from_transformers(name: str) -> Teacher:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    repo, _, revision = name.removeprefix(TRANSFORMERS_PREFIX).partition("@")
    try:
        model = AutoModelForImageClassification.from_pretrained(repo, revision=revision or "main", use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(repo, revision=revision or "main")
    except _LOAD_ERRORS as error:
        raise _cannot_load(name, error) from error
    config = model.config
    timm_cfg = getattr(config, "pretrained_cfg", None)
    size, mean, std = (
        (timm_cfg["input_size"][-1], timm_cfg["mean"], timm_cfg["std"]) if timm_cfg else _input_of(processor, name)
    )
    labels = [config.id2label[i] for i in range(config.num_labels)]
    generic = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    return Teacher(
        name=name,
        model=_LogitsOnly(model),
        mean=tuple(mean),
        std=tuple(std),
        size=int(size),
        num_classes=int(config.num_labels),
        architecture=str(getattr(config, "architecture", None) or config.model_type),
        licence=str((timm_cfg or {}).get("license") or "unknown"),
        revision=getattr(config, "_commit_hash", None),
        weights_sha256=state_sha256(model),
        label_names=None if generic else tuple(labels),
    )


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
        return int(sides[0]), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return int(sides[0]), processor.image_mean, processor.image_std  # type: ignore[attr-defined]
