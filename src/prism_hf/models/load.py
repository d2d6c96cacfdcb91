"""Load teachers by name: frozen image classifiers, each with its own normalization, input size and license."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from pydantic import model_validator
from timm.data import resolve_model_data_config
from timm.models import PretrainedCfg

from ..errors import TeacherError
from .download import CONFIG, INDEX, WEIGHTS, ModelFiles, fetch
from .load_transformers import from_transformers
from .teacher import StatedInput, Teacher, cannot_load, check_links, digest_of_tensors

PICKLED_DEFAULT = "pytorch_model.bin"
"""What timm calls weights whose safe twin is model.safetensors."""


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
    # The libraries initialize weights at random before they load them.
    with torch.random.fork_rng(devices=[]):
        teacher = _load(name, squeezed or {})
    teacher.model.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return teacher


def _load(name: str, squeezed: Mapping[str, Path]) -> Teacher:
    scheme, colon, source = name.partition(":")
    match scheme + colon:
        case "squeeze:":
            if name not in squeezed:
                raise TeacherError(f"teacher {name!r} is not trained yet; run recipes/squeeze.py on the recipe first")
            return _from_folder(ModelFiles(squeezed[name]), name)
        case "local-dir:":
            return _from_folder(ModelFiles(Path(source)), name)
        case "hf-hub:" | "hf_hub:":
            return _from_folder(fetch(name, source, [[CONFIG], [WEIGHTS]]), name)
        case "transformers:":
            local = os.path.isdir(source)
            files = ModelFiles(Path(source)) if local else fetch(name, source, [[CONFIG], [WEIGHTS, INDEX]])
            return from_transformers(files, name)
        case _:
            return _from_registry(name)


class _Config(StatedInput):
    """A config.json of timm, as far as it is read here; facts lie in `pretrained_cfg`, or flat in older files."""

    architecture: str
    label_names: list[str] | dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, content: object) -> object:
        facts = content.get("pretrained_cfg") if isinstance(content, dict) else None
        return {**content, **facts} if isinstance(content, dict) and isinstance(facts, dict) else content


def _from_folder(files: ModelFiles, name: str) -> Teacher:
    """Load a folder with config.json and model.safetensors, as timm saves it."""
    folder = files.folder
    missing = [file for file in (CONFIG, WEIGHTS) if not os.path.isfile(folder / file)]
    if missing:
        raise TeacherError(
            f"teacher {name!r}: {folder} has no {' and no '.join(missing)}; expected a timm folder with config.json and "
            "model.safetensors (pickled weights are not loaded)"
        )
    check_links(folder, name)
    try:
        architecture = _Config.read(folder / CONFIG).architecture
    except ValueError as error:
        raise TeacherError(
            f"teacher {name!r}: {error}; if it is a model of transformers, name it transformers:ORG/NAME"
        ) from error
    if not timm.is_model(architecture):
        raise TeacherError(f"teacher {name!r}: timm knows no architecture {architecture!r}, as {folder / CONFIG} names")
    return _from_timm(f"local-dir:{folder}", name, files)


def _from_registry(name: str) -> Teacher:
    """Load a plain timm name: timm knows architecture, classes and normalization, the Hub has the weights."""
    cfg = _registered(name)
    file = cfg.hf_hub_filename or PICKLED_DEFAULT
    weights = WEIGHTS if file == PICKLED_DEFAULT else file
    if not weights.endswith(".safetensors"):
        raise TeacherError(f"teacher {name!r}: timm loads it from {file}, and only safetensors are opened; use another one")
    files = fetch(name, cfg.hf_hub_id, [[weights]])
    return _from_timm(name, name, files, {"file": str(files.folder / weights)})


def _registered(name: str) -> PretrainedCfg:
    architecture = name.split(".")[0]
    if ":" in name or "/" in name:
        raise TeacherError(
            f"teacher {name!r} is not a timm name; other sources are squeeze:ARCH, hf-hub:ORG/NAME[@REVISION], "
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


def _from_timm(source: str, name: str, files: ModelFiles, overlay: dict[str, str] | None = None) -> Teacher:
    try:
        model = timm.create_model(source, pretrained=True, pretrained_cfg_overlay=overlay)
        config, cfg = resolve_model_data_config(model), model.pretrained_cfg
        classes, labels = int(model.num_classes), cfg.get("label_names") or []
        # timm allows a list, or names by number.
        names = [labels[key] for key in sorted(labels, key=int)] if isinstance(labels, dict) else list(labels)
    except Exception as error:  # a foreign config.json reaches constructors as keyword arguments: anything can follow
        raise cannot_load(name, error) from error
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
        licence=str(cfg.get("license") or files.licence or "unknown"),
        revision=files.commit,
        weights_sha256=digest_of_tensors(model.state_dict()),
        label_names=tuple(map(str, names)) or None,
    )
