"""Teachers from timm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import timm
from timm.data import resolve_model_data_config
from timm.models import PretrainedCfg

from ..errors import TeacherError
from .download import CONFIG, WEIGHTS, HubFiles, fetch
from .teacher import LOAD_ERRORS, Teacher, cannot_load, check_input, check_links, state_sha256

LOCAL_PREFIX = "local-dir:"


PICKLED_DEFAULT = "pytorch_model.bin"
"""What timm calls weights whose safe twin is model.safetensors."""


def from_folder(folder: Path, name: str, hub: HubFiles | None = None) -> Teacher:
    """A folder with config.json and model.safetensors, as timm saves it."""
    _check_folder(folder, name)
    return _from_timm(f"{LOCAL_PREFIX}{folder}", name, hub)


def from_registry(name: str) -> Teacher:
    """A plain timm name: timm knows architecture, classes and normalisation, the Hub has the weights."""
    cfg = _registered(name)
    file = cfg.hf_hub_filename or PICKLED_DEFAULT
    weights = WEIGHTS if file == PICKLED_DEFAULT else file
    if not weights.endswith(".safetensors"):
        raise TeacherError(f"teacher {name!r}: timm loads it from {file}, and only safetensors are opened; use another one")
    hub = fetch(name, cfg.hf_hub_id, needed=(), weights=(weights,))
    return _from_timm(name, name, hub, {"file": str(hub.folder / weights)})


def _from_timm(source: str, name: str, hub: HubFiles | None, overlay: dict[str, str] | None = None) -> Teacher:
    try:
        model = timm.create_model(source, pretrained=True, pretrained_cfg_overlay=overlay)
        config, cfg = resolve_model_data_config(model), model.pretrained_cfg
        classes, labels = int(model.num_classes), cfg.get("label_names")
    except LOAD_ERRORS as error:
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
    check_links(folder, name)
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
    check_input(name, cfg.get("input_size"), cfg.get("mean"), cfg.get("std"))
