"""Load teachers by name: frozen image classifiers, each with its own normalization, input size and license."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import timm
import torch
from pydantic import Field, model_validator
from timm.data import resolve_model_data_config

from ..errors import TeacherError
from ..images import imagenet_classes
from ..runtime import Facts, stray_link
from .build import LogitsOnly
from .download import ADAPTER, CONFIG, INDEX, PROCESSORS, WEIGHTS, ModelFiles, ShardIndex, fetch
from .norms import frozen
from .processor import PixelMap, pixel_map
from .teacher import Teacher, digest_of_tensors

_MOST = 2.0
"""Larger means and standard deviations are in units of 0..255; those of all timm models are at most 1."""
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _StatedInput(Facts):
    """The input format stated in a config, validated here because the libraries fail late or compute with bad values."""

    input_size: list[Annotated[int, Field(gt=0)]] | None = Field(None, min_length=3, max_length=3)
    mean: list[_Number] | None = None
    std: list[Annotated[_Number, Field(gt=0)]] | None = None

    @model_validator(mode="after")
    def _is_per_channel(self) -> Self:
        channels = self.input_size[0] if self.input_size else 3
        for key, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and len(value) != channels:
                raise ValueError(f"{key} is {value}; expected {channels} numbers")
        return self


class _TimmInput(_StatedInput):
    """The input format of a timm model, which always divides pixel values by 255 first."""

    @model_validator(mode="after")
    def _is_in_units(self) -> Self:
        for key, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and max(map(abs, value)) > _MOST:
                raise ValueError(f"{key} is {value}; expected the unit of pixels in [0, 1], so divide it by 255")
        return self


class _TimmConfig(_TimmInput):
    """The fields of a timm config.json that are used here, from `pretrained_cfg` or, in older files, the top level."""

    architecture: str
    label_names: list[str] | dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, content: object) -> object:
        facts = content.get("pretrained_cfg") if isinstance(content, dict) else None
        return {**content, **facts} if isinstance(content, dict) and isinstance(facts, dict) else content


class _WrappedConfig(Facts):
    """The fields of a transformers config.json that are used here; `pretrained_cfg` is that of a wrapped timm model."""

    pretrained_cfg: dict[str, object] | None = None
    model_args: dict[str, object] | None = None


def load_teachers(
    names: Sequence[str], *, device: torch.device, squeezed: Mapping[str, Path] | None = None
) -> dict[str, Teacher]:
    """Load each named teacher once.

    A name is `squeeze:arch` (its folder is in `squeezed`), a timm name, `hf-hub:org/name@revision`, `local-dir:path` or
    `transformers:org/name@revision`.

    Raises:
        TeacherError: A teacher cannot be loaded; one line with its name and the reason.
    """
    return {name: load_teacher(name, device=device, squeezed=squeezed) for name in dict.fromkeys(names)}


def load_teacher(name: str, *, device: torch.device, squeezed: Mapping[str, Path] | None = None) -> Teacher:
    """Load one teacher; see `load_teachers`."""
    # The libraries draw random initial weights first; this must not change the caller's random state.
    with torch.random.fork_rng(devices=[]):
        teacher = _load(name, squeezed or {})
    frozen(teacher.model.to(device))
    return teacher


def _load(name: str, squeezed: Mapping[str, Path]) -> Teacher:
    scheme, colon, source = name.partition(":")
    match scheme + colon:
        case "squeeze:":
            if name not in squeezed:
                raise TeacherError(f"teacher {name!r} is not trained yet; run `prism-hf squeeze` on the recipe first")
            return _from_folder(ModelFiles(squeezed[name]), name)
        case "local-dir:":
            return _from_folder(ModelFiles(Path(source)), name)
        case "hf-hub:" | "hf_hub:":
            return _from_folder(fetch(name, source, [[CONFIG], [WEIGHTS]]), name)
        case "transformers:":
            local = os.path.isdir(source)
            files = ModelFiles(Path(source)) if local else fetch(name, source, [[CONFIG], [WEIGHTS, INDEX]])
            return _from_transformers(files, name)
        case _:
            return _from_registry(name)


def _from_folder(files: ModelFiles, name: str) -> Teacher:
    """Load a folder with config.json and model.safetensors, as saved by timm."""
    folder = files.folder
    missing = [file for file in (CONFIG, WEIGHTS) if not os.path.isfile(folder / file)]
    if missing:
        raise TeacherError(
            f"teacher {name!r}: {folder} has no {' or '.join(missing)}; expected a timm folder with config.json and "
            "model.safetensors (pickled weights are not loaded)"
        )
    _check_links(folder, name)
    try:
        architecture = _TimmConfig.read(folder / CONFIG).architecture
    except ValueError as error:
        raise TeacherError(
            f"teacher {name!r}: {error}; if it is a transformers model, name it transformers:ORG/NAME"
        ) from error
    if not timm.is_model(architecture):
        raise TeacherError(f"teacher {name!r}: timm has no architecture {architecture!r}, named in {folder / CONFIG}")
    return _from_timm(f"local-dir:{folder}", name, files)


def _from_registry(name: str) -> Teacher:
    """Load a plain timm name: timm defines architecture, classes and normalization, and the Hub has the weights."""
    architecture = name.split(".")[0]
    if ":" in name or "/" in name:
        raise TeacherError(
            f"teacher {name!r} is not a timm name; other sources are squeeze:ARCH, hf-hub:ORG/NAME[@REVISION], "
            "local-dir:PATH and transformers:ORG/NAME[@REVISION]"
        )
    if not timm.is_model(architecture):
        close = timm.list_models(f"{architecture[:6]}*")[:4]
        hint = f"similar: {', '.join(close)}" if close else "timm.list_models() lists all"
        raise TeacherError(f"teacher {name!r}: timm has no such architecture; {hint}")
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:
        cfg = None  # no such tag
    if cfg is None or not cfg.hf_hub_id:
        tags = [tag for tag in timm.list_pretrained(f"{architecture}.*") if timm.get_pretrained_cfg(tag).hf_hub_id]
        hint = f"available: {', '.join(tags[:4])}" if tags else "timm.list_pretrained() lists all"
        raise TeacherError(f"teacher {name!r}: timm has no weights with that name on the Hub; {hint}")
    file = cfg.hf_hub_filename or WEIGHTS
    weights = WEIGHTS if file == "pytorch_model.bin" else file  # the Hub also has these weights as safetensors
    if not weights.endswith(".safetensors"):
        raise TeacherError(f"teacher {name!r}: timm loads it from {file}, but only safetensors are opened; use another one")
    files = fetch(name, cfg.hf_hub_id, [[weights]])
    return _from_timm(name, name, files, {"file": str(files.folder / weights)})


def _from_timm(source: str, name: str, files: ModelFiles, overlay: dict[str, str] | None = None) -> Teacher:
    try:
        model = timm.create_model(source, pretrained=True, pretrained_cfg_overlay=overlay)
        config, cfg = resolve_model_data_config(model), model.pretrained_cfg
        classes, labels = int(model.num_classes), cfg.get("label_names") or []
        of_imagenet = overlay is not None or "in1k" in str(cfg.get("tag") or "")
    except Exception as error:  # an untrusted config.json sets constructor arguments, so any error can occur
        raise _cannot_load(name, error) from error
    if classes != cfg["num_classes"]:
        # In this case, timm drops the stored head and keeps a random one.
        raise TeacherError(
            f"teacher {name!r}: its config builds {classes} classes, but its weights have {cfg['num_classes']}; "
            "set the same num_classes in model_args and pretrained_cfg"
        )
    numbered = labels if isinstance(labels, dict) else dict(enumerate(labels))
    names = _label_names(numbered, classes, name) if labels else []
    if not names and of_imagenet and classes == len(imagenet_classes()):
        names = [label for _, label in imagenet_classes()]
    return Teacher(
        name=name,
        model=model,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=int(config["input_size"][-1]),
        num_classes=classes,
        architecture=str(cfg.get("architecture", source)),
        license=str(cfg.get("license") or files.license or "unknown"),
        revision=files.commit,
        weights_sha256=digest_of_tensors(model.state_dict()),
        label_names=tuple(map(str, names)) or None,
    )


def _from_transformers(files: ModelFiles, name: str) -> Teacher:
    """Load a transformers classifier with the normalization of its image processor."""
    wrapped = _check_folder(files.folder, name).pretrained_cfg or {}
    if not wrapped and not any((files.folder / file).is_file() for file in PROCESSORS):
        raise TeacherError(
            f"teacher {name!r}: {files.folder} has no {PROCESSORS[0]}, so its pixel values are unknown; save the image "
            f"processor too: AutoImageProcessor.from_pretrained(ORIGINAL).save_pretrained({str(files.folder)!r})"
        )
    model, processor = _load_with_processor(files.folder, name)
    config = model.config
    size, pixels = _input_format(processor, getattr(config, "num_channels", 3), name)
    labels = _label_names(config.id2label, int(config.num_labels), name)
    generic = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    return Teacher(
        name=name,
        model=LogitsOnly(model),
        mean=pixels.mean,
        std=pixels.std,
        order=None if pixels.order == tuple(sorted(pixels.order)) else pixels.order,
        size=size,
        num_classes=int(config.num_labels),
        architecture=str(getattr(config, "architecture", None) or config.model_type),
        license=str(wrapped.get("license") or files.license or "unknown"),
        revision=files.commit,
        weights_sha256=digest_of_tensors(model.state_dict()),
        label_names=None if generic else tuple(labels),
    )


def _label_names(labels: Mapping[Any, object], classes: int, name: str) -> list[str]:
    """Return the class names in the order of their numbers; refuse names that do not cover all classes."""
    try:
        numbered = {int(number): str(label) for number, label in labels.items()}
    except ValueError as error:
        raise TeacherError(
            f"teacher {name!r}: its class names have the keys {list(labels)[:5]}, expected numbers"
        ) from error
    if sorted(numbered) != list(range(classes)):
        absent = sorted(set(range(classes)) - set(numbered))
        wrong = f"no class {absent[0]}" if absent else f"class {max(numbered)}"
        raise TeacherError(
            f"teacher {name!r} has {classes} classes, but its config names {len(numbered)} ({wrong}); expected a name for "
            f"each number from 0 to {classes - 1} in id2label (transformers) or label_names (timm)"
        )
    return [numbered[number] for number in range(classes)]


def _check_folder(folder: Path, name: str) -> _WrappedConfig:
    """Return the config of a folder; refuse a folder that would load anything but its own safetensors."""
    _check_links(folder, name)
    try:
        config = _WrappedConfig.read(folder / CONFIG)
        if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
            ShardIndex.read(folder / INDEX)
    except ValueError as error:
        raise _cannot_load(name, error) from error
    # timm passes model_args to its own checkpoint loader, which also opens pickles.
    if "checkpoint_path" in (config.model_args or {}):
        raise TeacherError(f"teacher {name!r}: its config.json names another checkpoint; only model.safetensors is opened")
    if (folder / ADAPTER).is_file():
        raise TeacherError(f"teacher {name!r} adapts another model ({ADAPTER}); merge the two and save the whole model")
    return config


def _load_with_processor(folder: Path, name: str) -> tuple[Any, object]:
    """Load the model and its image processor; refuse weights that transformers would complete with random values."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **local
        )
        processor = AutoImageProcessor.from_pretrained(folder, **local)
    except Exception as error:  # an untrusted config.json sets constructor arguments, so any error can occur
        raise _cannot_load(name, error) from error
    if absent := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        raise TeacherError(
            f"teacher {name!r}: its weights lack {len(absent)} tensors of the model, for example {absent[0]!r}; "
            "use a checkpoint trained for image classification"
        )
    return model, processor


def _input_format(processor: Any, channels: int, name: str) -> tuple[int, PixelMap]:
    """Return the side of an image processor's square output, and what it does to the pixels."""
    values = getattr(processor, "data_config", None)  # only processors of wrapped timm models have it
    if values is not None:
        stated = _stated_by(_TimmInput, values, name)
        if stated.input_size is None or stated.mean is None or stated.std is None:
            raise TeacherError(
                f"teacher {name!r}: its image processor lacks an input size, mean or std; load it through timm"
            )
        return stated.input_size[-1], PixelMap(tuple(stated.mean), tuple(stated.std), tuple(range(len(stated.mean))))
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = crop or getattr(processor, "size", None) or {}
    sides = {size[key] for key in ("height", "width", "shortest_edge") if key in size and size[key]}
    if len(sides) != 1:
        raise TeacherError(
            f"teacher {name!r}: its image processor has size {dict(size)!r}, expected one side of a square; load the model "
            "through timm, or use another teacher"
        )
    side = sides.pop()
    if getattr(processor, "do_normalize", True):
        numbers = {key: getattr(processor, f"image_{key}", None) for key in ("mean", "std")}
        _stated_by(_StatedInput, {"input_size": [channels, side, side], **numbers}, name)
    return side, pixel_map(processor, channels, min(side, 64), name)


def _stated_by(kind: type[_StatedInput], values: Mapping[str, object], name: str) -> _StatedInput:
    try:
        return kind.parse(json.dumps(values).encode(), "its image processor")
    except ValueError as error:
        raise TeacherError(f"teacher {name!r}: {error}") from error


def _check_links(folder: Path, name: str) -> None:
    """Refuse a folder that contains a link to a path outside the folder."""
    link = stray_link(folder)
    if link is not None:
        raise TeacherError(f"teacher {name!r}: {link} is a link that leads out of its folder; replace it with the file")


def _cannot_load(name: str, error: Exception) -> TeacherError:
    """Return the error for a model that timm or transformers could not load."""
    reason = " ".join(str(error).split())[:300]
    if "reparam" in str(error):
        return TeacherError(
            f"teacher {name!r} cannot be loaded: its weights were reparameterized for deployment, with the BN layers "
            "folded into convolutions; use the weights from training"
        )
    return TeacherError(
        f"teacher {name!r} cannot be loaded ({type(error).__name__}: {reason}); expected config.json and safetensors that "
        "match each other, as saved by timm or transformers"
    )
