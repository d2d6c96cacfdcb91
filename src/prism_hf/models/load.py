"""Load teachers by name: frozen image classifiers, each with its own normalization, input size and license."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..errors import TeacherError
from .download import CONFIG, WEIGHTS, ModelFiles, fetch
from .load_timm import from_folder, from_registry
from .load_transformers import from_transformers
from .teacher import Teacher


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
            return from_folder(ModelFiles(squeezed[name]), name)
        case "local-dir:":
            return from_folder(ModelFiles(Path(source)), name)
        case "hf-hub:" | "hf_hub:":
            return from_folder(fetch(name, source, [[CONFIG], [WEIGHTS]]), name)
        case "transformers:":
            return from_transformers(source, name)
        case _:
            return from_registry(name)
