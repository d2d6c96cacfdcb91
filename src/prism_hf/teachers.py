"""Who teaches: image classifiers by name, frozen, each with its own normalisation, input size and licence.

Legend: B images, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.models import PretrainedCfg
from torch import Tensor, nn

from .errors import TeacherError
from .outside import stray_link
from .pixels import reference_mean_std
from .recipe import SQUEEZE_PREFIX
from .weights import CONFIG, INDEX, WEIGHTS, HubFiles, fetch, shard_names

HUB_PREFIXES = ("hf-hub:", "hf_hub:")
LOCAL_PREFIX = "local-dir:"
TRANSFORMERS_PREFIX = "transformers:"
ADAPTER = "adapter_config.json"
PICKLED_DEFAULT = "pytorch_model.bin"
"""What timm calls weights whose safe twin is model.safetensors."""
_BESIDE_TRANSFORMERS = ("preprocessor_config.json", "processor_config.json", ADAPTER)


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

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

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
        names: `squeeze:arch`, a timm name, `hf-hub:org/name@revision`, `local-dir:path` or
            `transformers:org/name@revision`.
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
        return _from_folder(folder, name)
    if name.startswith(LOCAL_PREFIX):
        return _from_folder(Path(name.removeprefix(LOCAL_PREFIX)), name)
    if name.startswith(TRANSFORMERS_PREFIX):
        return _from_transformers(name)
    if name.startswith(HUB_PREFIXES):
        hub = fetch(name, name.partition(":")[2])
        return _from_folder(hub.folder, name, hub)
    return _from_registry(name)


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
    return digest_of_tensors(model.state_dict())


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# A foreign config.json reaches the constructors of timm and transformers as keyword arguments: anything can follow.
_LOAD_ERRORS = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError, OSError, SafetensorError,
)  # fmt: skip


def _from_folder(folder: Path, name: str, hub: HubFiles | None = None) -> Teacher:
    _check_folder(folder, name)
    return _from_timm(f"{LOCAL_PREFIX}{folder}", name, hub)


def _from_registry(name: str) -> Teacher:
    """A plain timm name: timm knows architecture, classes and normalisation, the Hub has the weights."""
    cfg = _registered(name)
    file = cfg.hf_hub_filename or PICKLED_DEFAULT
    weights = WEIGHTS if file == PICKLED_DEFAULT else file
    if not weights.endswith(".safetensors"):
        raise TeacherError(f"teacher {name!r}: timm loads it from {file}, and only safetensors are opened; use another one")
    hub = fetch(name, cfg.hf_hub_id, needed=(), weights=(weights,))
    return _from_timm(name, name, hub, {"file": str(hub.folder / hub.weights)})


def _from_timm(source: str, name: str, hub: HubFiles | None, overlay: dict[str, str] | None = None) -> Teacher:
    try:
        model = timm.create_model(source, pretrained=True, pretrained_cfg_overlay=overlay)
        config, cfg = resolve_model_data_config(model), model.pretrained_cfg
        classes, labels = int(model.num_classes), cfg.get("label_names")
    except _LOAD_ERRORS as error:
        raise _cannot_load(name, error) from error
    if classes != cfg["num_classes"]:
        # timm drops the stored head then, and leaves a random one.
        raise TeacherError(
            f"teacher {name!r}: its config builds {classes} classes for weights of {cfg['num_classes']}; "
            "make num_classes the same in model_args and pretrained_cfg"
        )
    return Teacher(
        name=name,
        model=model,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=int(config["input_size"][-1]),
        num_classes=classes,
        architecture=str(cfg.get("architecture", source)),
        licence=str(cfg.get("license") or (hub and hub.licence) or "unknown"),
        revision=hub.commit if hub else None,
        weights_sha256=state_sha256(model),
        label_names=_label_names(labels, name),
    )


def _label_names(stated: object, name: str) -> tuple[str, ...] | None:
    """Class names as timm allows them: in order, or by number."""
    if not stated:
        return None
    try:
        found = [stated[key] for key in sorted(stated, key=int)] if isinstance(stated, dict) else list(stated)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        found = [None]
    if not all(isinstance(label, str) for label in found):
        raise TeacherError(f"teacher {name!r}: its config says label_names {str(stated)[:80]!r}; expected a list of names")
    return tuple(found)


def _registered(name: str) -> PretrainedCfg:
    architecture = name.split(".")[0]
    if ":" in name or "/" in name:
        raise TeacherError(
            f"teacher {name!r} is no timm name; other sources are squeeze:ARCH, hf-hub:ORG/NAME[@REVISION], "
            "local-dir:PATH and transformers:ORG/NAME[@REVISION]"
        )
    if not timm.is_model(architecture):
        close = timm.list_models(f"{architecture[:6]}*")[:4]
        hint = f"similar: {', '.join(close)}" if close else "timm.list_models() lists all"
        raise TeacherError(f"teacher {name!r}: timm knows no such architecture; {hint}")
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:
        cfg = None  # no such tag
    if cfg is None or not cfg.hf_hub_id:
        tags = [known for known in timm.list_pretrained(f"{architecture}.*") if timm.get_pretrained_cfg(known).hf_hub_id]
        hint = f"timm has {', '.join(tags[:4])}" if tags else "timm.list_pretrained() lists what it has"
        raise TeacherError(f"teacher {name!r}: timm knows no weights of that name on the Hub; {hint}")
    return cfg


def _check_folder(folder: Path, name: str) -> None:
    missing = [f for f in (CONFIG, WEIGHTS) if not os.path.isfile(folder / f)]
    if missing:
        raise TeacherError(
            f"teacher {name!r}: {folder} has no {' and no '.join(missing)}; expected a timm folder with config.json and "
            "model.safetensors (pickled weights are not loaded)"
        )
    _check_links(folder, name)
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        architecture, cfg = content["architecture"], {**content, **(content.get("pretrained_cfg") or {})}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise TeacherError(
            f"teacher {name!r}: {folder}/config.json does not name a timm architecture; "
            "a model of transformers is transformers:ORG/NAME"
        ) from error
    if not (isinstance(architecture, str) and timm.is_model(architecture)):
        raise TeacherError(f"teacher {name!r}: timm knows no architecture {architecture!r}, as {folder}/config.json names")
    _check_input(name, cfg.get("input_size"), cfg.get("mean"), cfg.get("std"))


def _check_input(name: str, size: object, mean: object, std: object) -> None:
    """What a config says of the input; the libraries take it as it is, and fail at it late or calculate with it.

    Args:
        name: The teacher.
        size: Channels, height and width, or `None` if the architecture knows.
        mean: One number per channel, or `None`.
        std: One number per channel, or `None`.

    Raises:
        TeacherError: Names the value that cannot be meant.
    """
    if size is not None and not (_are_numbers(size, 3) and all(isinstance(n, int) and n > 0 for n in size)):  # type: ignore[attr-defined]
        raise TeacherError(f"teacher {name!r}: its config says input_size {str(size)[:80]}; expected [C, height, width]")
    channels = 3 if size is None else int(size[0])  # type: ignore[index]
    for key, value in (("mean", mean), ("std", std)):
        if value is not None and not _are_numbers(value, channels):
            raise TeacherError(f"teacher {name!r}: its config says {key} {str(value)[:80]}; expected {channels} numbers")
    if std is not None and min(std) <= 0:  # type: ignore[call-overload]
        raise TeacherError(f"teacher {name!r}: its config says std {str(std)[:80]}; expected numbers above 0")


def _are_numbers(value: object, count: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == count
        and all(isinstance(number, int | float) and math.isfinite(number) for number in value)
    )


def _check_links(folder: Path, name: str) -> None:
    link = stray_link(folder)
    if link is not None:
        raise TeacherError(f"teacher {name!r}: {link} is a link that leads out of its folder; put the file itself there")


def _cannot_load(name: str, error: Exception) -> TeacherError:
    reason = " ".join(str(error).split())[:200]
    return TeacherError(
        f"teacher {name!r} cannot be loaded ({type(error).__name__}: {reason}); expected config.json and safetensors that "
        "fit each other, as timm or transformers saves them"
    )


class _LogitsOnly(nn.Module):
    """A transformers classifier with timm's calling convention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def _from_transformers(name: str) -> Teacher:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    source = name.removeprefix(TRANSFORMERS_PREFIX)
    hub = None if os.path.isdir(source) else fetch(name, source, weights=(WEIGHTS, INDEX), welcome=_BESIDE_TRANSFORMERS)
    folder = hub.folder if hub else Path(source)
    _check_transformers_folder(folder, name)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **local
        )
        processor = AutoImageProcessor.from_pretrained(folder, **local)
    except _LOAD_ERRORS as error:
        raise _cannot_load(name, error) from error
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
    _check_input(name, [getattr(config, "num_channels", 3), size, size], mean, std)
    labels = [config.id2label.get(i, f"LABEL_{i}") for i in range(config.num_labels)]
    generic = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    return Teacher(
        name=name,
        model=_LogitsOnly(model),
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
    _check_links(folder, name)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _cannot_load(name, error) from error
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
            raise _cannot_load(name, error) from error


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
