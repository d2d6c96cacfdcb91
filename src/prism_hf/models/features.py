"""Penultimate features of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from ..images import to_reference
from .teacher import Teacher


@torch.no_grad()
def penultimate_features(
    teacher: Teacher, images: Callable[[range], Tensor], count: int, *, device: torch.device, batch_size: int = 256
) -> Iterator[tuple[range, Tensor]]:
    """Yield the inputs of the classifier layer, batch by batch: rows and their features, (B, D) float32 on the CPU.

    Args:
        teacher: The network.
        images: Rows -> (B, C, H, W) uint8.
        count: N.
        device: Where the network is.
        batch_size: Images per call.

    Raises:
        TeacherError: The network does not end in a linear layer.
    """
    classifier = classifier_of(teacher.model)
    if classifier is None:
        raise TeacherError(f"network {teacher.name!r} has no linear layer and so no penultimate features; name another one")
    seen: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).float().cpu()))
    try:
        for start in range(0, count, batch_size):
            rows = range(start, min(start + batch_size, count))
            teacher.logits(to_reference(images(rows).to(device)))
            yield rows, torch.cat(seen)
            seen.clear()
    finally:
        handle.remove()


def classifier_of(model: nn.Module) -> nn.Linear | None:
    """Return the layer that makes the logits: timm says which it is; elsewhere it is the last linear layer."""
    named = getattr(model, "get_classifier", None)
    if callable(named):
        layer = named()
        return layer if isinstance(layer, nn.Linear) else None
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return linear[-1] if linear else None
