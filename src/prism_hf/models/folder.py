"""A model folder: a trained network stored so that timm and transformers both load it.

It contains config.json, model.safetensors and one facts file (see `facts`). It names no local path, so it can be shared.
"""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from ..errors import RecipeError
from ..images import REFERENCE, SourceData
from ..recipe import Recipe, public_recipe
from ..runtime import draft_folder, read_json, swap_folder, writing
from .build import build_network, seeded
from .facts import ScoredOn, SourceFacts, StudentFacts, TeacherFacts

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
_ORIGIN = ("tag", "url", "file", "hf_hub_id", "hf_hub_filename", "source", "origin_url", "paper_name", "paper_ids", "notes")


def is_stored(folder: Path, facts_file: str) -> bool:
    """Return whether a folder contains a finished network; folders are renamed into place as a whole."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", facts_file))


def store_network(
    network: nn.Module,
    folder: Path,
    facts: TeacherFacts | StudentFacts,
    *,
    size: int,
    class_names: Sequence[str],
    mean_std: MeanStd | None = None,
    replace: bool = False,
) -> None:
    """Write a complete folder under a temporary name, then rename it, so that readers never see a partial folder.

    A finished network in `folder` is kept unless `replace` is set. The network takes images of `size` pixels with this mean
    and standard deviation, by default those of the reference normalization. A student with 1 channel is widened to RGB:
    three copies of a gray image give the same output as the gray image did. A teacher already takes RGB. The license is
    that of the data, from which weights are derived, and of a pretrained start.

    Raises:
        RecipeError: The network is not a timm architecture, or cannot be widened.
    """
    architecture, source = facts.architecture, facts.source
    assert architecture is not None, "only facts from earlier versions lack architecture and source"
    assert source is not None
    if not timm.is_model(architecture):
        raise RecipeError(
            f"network {architecture!r} cannot be stored as a model folder: only timm architectures can be shared"
        )
    network = copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    channels = facts.channels if isinstance(facts, StudentFacts) else 3
    if channels == 1:
        network = _widened(network, architecture, size, len(class_names))
    license = facts.license if isinstance(facts, TeacherFacts) else source.license
    config = _config(network, size, channels, class_names, license, mean_std or REFERENCE[channels])
    draft = draft_folder(folder)
    try:
        with writing(folder):
            save_for_hf(network, str(draft), model_config=config, safe_serialization=True)
            _repair_config(draft / "config.json")
            facts.write(draft / facts.FILE)
        if replace or not is_stored(folder, facts.FILE):
            swap_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _config(
    network: nn.Module, size: int, channels: int, class_names: Sequence[str], license: str, mean_std: MeanStd
) -> dict[str, object]:
    mean, std = mean_std
    copies = 3 // channels
    return {
        "num_classes": len(class_names),
        "label_names": list(class_names),
        "pretrained_cfg": {
            **network.pretrained_cfg,  # type: ignore[dict-item]
            "input_size": [3, size, size],
            "test_input_size": None,
            "num_classes": len(class_names),
            "mean": mean * copies,
            "std": std * copies,
            "crop_pct": 1.0,
            "test_crop_pct": None,
            "interpolation": "bilinear",
            "license": license,
            "label_names": list(class_names),
        },
    }


def _repair_config(path: Path) -> None:
    # timm writes model_args.num_classes, which transformers then passes twice (timm 1.0.31, transformers 5.23).
    config = read_json(path)
    config.get("model_args", {}).pop("num_classes", None)
    # It also names the pretrained weights of this architecture, which are not the weights in this folder.
    cfg = config["pretrained_cfg"]
    config["pretrained_cfg"] = {key: value for key, value in cfg.items() if key not in _ORIGIN}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _widened(network: nn.Module, architecture: str, size: int, num_classes: int) -> nn.Module:
    """Return a gray network widened to RGB input; timm's `in_chans=1` reverses this."""
    first: Any = network.pretrained_cfg.get("first_conv") or ()  # type: ignore[operator, union-attr]
    state = dict(network.state_dict())
    for key in (f"{name}.weight" for name in ([first] if isinstance(first, str) else first)):
        if key in state and state[key].ndim == 4:
            state[key] = state[key].repeat(1, 3, 1, 1) / 3
    with seeded(0, torch.device("cpu")), torch.no_grad():
        wide = build_network(architecture, num_classes=num_classes, channels=3).eval()
        gray = torch.randn(2, 1, size, size)
        expected = network.eval()(gray)
        try:
            wide.load_state_dict(state)
            equal = torch.allclose(wide(gray.expand(-1, 3, -1, -1)), expected, rtol=1e-3, atol=1e-3)
        except RuntimeError:
            equal = False
    if not equal:  # some first layers rescale their weights
        raise RecipeError(f"network {architecture!r} cannot be shared: its first layer cannot be widened from gray to RGB")
    return wide


def source_facts(recipe: Recipe, data: SourceData | None) -> SourceFacts:
    """Return the facts of the real dataset behind a network; `data` is `None` if the dataset cannot be reached."""
    public = public_recipe(recipe).data
    return SourceFacts(
        id=public.source,
        on_hub=data is not None and data.on_hub,
        revision=None if data is None else data.revision,
        license=public.license,
    )


def scored_on(recipe: Recipe) -> ScoredOn:
    """Return the source and split of the images that a network was scored on."""
    data = public_recipe(recipe).data
    held_out = f"{data.train_split}, {data.validation_fraction:g} of it held out"
    return ScoredOn(id=data.source, split=held_out if data.validation_fraction else data.test_split)
