"""What a squeezed teacher starts from: random weights, or a pretrained network with a new head.

`squeeze:resnet18` starts from random weights, `squeeze:resnet18.a1_in1k`, `squeeze:hf-hub:ORG/NAME` and
`squeeze:local-dir:PATH` from those of the named network.
"""

import copy
from functools import lru_cache

import torch

from ..errors import TeacherError
from ..images import REFERENCE
from ..recipe import SQUEEZE_PREFIX, Recipe, without_folders
from .build import build_network
from .facts import StartFacts
from .load import load_teacher
from .teacher import Teacher


def pretrained_start(name: str) -> str | None:
    """Return the name of the network that a `squeeze:` teacher starts from, or `None` for random weights."""
    source = name.removeprefix(SQUEEZE_PREFIX)
    return source if "." in source or ":" in source else None


@lru_cache(maxsize=8)
def load_start(source: str) -> Teacher:
    """Load a pretrained network to start from, on the CPU.

    Raises:
        TeacherError: It cannot be loaded, is not a timm network, or takes gray images.
    """
    start = load_teacher(source, device=torch.device("cpu"))
    if not callable(getattr(start.model, "reset_classifier", None)) or len(start.mean) != 3:
        raise TeacherError(
            f"teacher {SQUEEZE_PREFIX + source!r} cannot be fine-tuned; start from a timm network for RGB images"
        )
    return start


def architecture_of(name: str) -> str:
    """Return the timm architecture of a `squeeze:` teacher."""
    source = pretrained_start(name)
    return name.removeprefix(SQUEEZE_PREFIX) if source is None else load_start(source).architecture


def input_size_of(name: str, recipe: Recipe) -> int:
    """Return the side of the images that a `squeeze:` teacher will take, in pixels."""
    source = pretrained_start(name)
    return load_start(source).size if source is not None and recipe.squeeze.input_size == "own" else recipe.data.size


def untrained_teacher(name: str, recipe: Recipe) -> Teacher:
    """Return the network of a `squeeze:` teacher before its training, with the input that it will have, on the CPU.

    Call it with a seeded random state, which a new head is drawn from. Without a pretrained start, the input has the
    reference normalization. All parameters can be trained.

    Raises:
        TeacherError: See `load_start`.
    """
    classes, source = recipe.data.num_classes, pretrained_start(name)
    architecture = architecture_of(name)
    if source is None:
        network, (mean, std) = build_network(architecture, num_classes=classes, channels=3), REFERENCE[3]
    else:
        start = load_start(source)
        network, (mean, std) = copy.deepcopy(start.model).requires_grad_(True), (start.mean, start.std)
        network.reset_classifier(classes)  # type: ignore[operator]
    return Teacher(name, network, mean, std, input_size_of(name, recipe), classes, architecture, "", None, "", None)


def start_facts(name: str) -> StartFacts | None:
    """Return name, license and revision of the network that a teacher starts from; `None` for random weights."""
    source = pretrained_start(name)
    if source is None:
        return None
    start = load_start(source)
    public, sha256 = without_folders(source), start.weights_sha256
    return StartFacts(name=public, license=start.license, revision=start.revision, weights_sha256=sha256)
