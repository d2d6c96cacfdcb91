"""Who teaches: image classifiers by name, frozen, each with its own normalisation, input size and licence.

Legend: B images, C channels, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..errors import TeacherError
from ..recipe.schema import SQUEEZE_PREFIX
from .download import fetch
from .load_timm import LOCAL_PREFIX, from_folder, from_registry
from .load_transformers import TRANSFORMERS_PREFIX, from_transformers
from .teacher import Teacher

HUB_PREFIXES = ("hf-hub:", "hf_hub:")


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
        return from_folder(folder, name)
    if name.startswith(LOCAL_PREFIX):
        return from_folder(Path(name.removeprefix(LOCAL_PREFIX)), name)
    if name.startswith(TRANSFORMERS_PREFIX):
        return from_transformers(name)
    if name.startswith(HUB_PREFIXES):
        hub = fetch(name, name.partition(":")[2])
        return from_folder(hub.folder, name, hub)
    return from_registry(name)
