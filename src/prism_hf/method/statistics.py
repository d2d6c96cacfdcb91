"""Statistics of convolution inputs: their averages over real data.

Legend: B images, C channels, H W pixels, G cells of a feature map (about H / patch times W / patch).

Source: G-VBSM (arXiv 2311.17950), convolution statistics.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from ..images import to_reference
from ..models import Teacher
from .moments import cell_statistics, channel_statistics

STATISTICS = ("channel_mean", "channel_var", "patch_mean", "patch_var")
"""The statistics of a convolution's input that are matched."""
BATCH_SIZE = 250
"""Real images per pass. It is fixed for all machines, because the variance of a batch depends on which images share it."""


def conv_statistics(x: Tensor, patch: int) -> dict[str, Tensor]:
    """Return all four statistics of a convolution's input by name, (B, C, H, W) -> (C,) and (G,), without a gradient."""
    cells = (value.flatten() for value in cell_statistics(x, patch))
    return dict(zip(STATISTICS, (*channel_statistics(x), *cells), strict=True))


def shuffled_batches(
    images: Callable[[Tensor], Tensor], count: int, *, seed: int, batch_size: int = BATCH_SIZE
) -> Iterator[Tensor]:
    """Return all `count` real images in batches that mix the classes, each image once, in an order set by the seed.

    `images` maps row numbers, (B,) int64, to images, (B, C, H, W) uint8.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (images(rows) for rows in order.split(batch_size))


@torch.no_grad()
def gather_statistics(teacher: Teacher, batches: Iterable[Tensor], *, patch: int) -> dict[str, Tensor]:
    """Average the statistics of each convolution's input over real batches, (B, C, H, W) uint8, weighted by batch size.

    Returns:
        `N.channel_mean`, `N.channel_var` (C,), `N.patch_mean` and `N.patch_var` (G,), float32 on the CPU. N numbers
        the convolutions in execution order; a convolution that runs twice counts twice.

    Raises:
        TeacherError: The network does not run any Conv2d layer.
    """
    seen: dict[str, Tensor] = {}

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        number = len(seen) // len(STATISTICS)
        seen.update({f"{number}.{key}": value for key, value in conv_statistics(inputs[0], patch).items()})

    layers = [layer for layer in teacher.model.modules() if isinstance(layer, nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    count, totals = 0, dict[str, Tensor]()
    try:
        for images in batches:
            seen.clear()
            teacher.logits(to_reference(images.to(teacher.device)))
            if not seen:
                name = teacher.name
                raise TeacherError(f"teacher {name!r} has no Conv2d layer; remove synthesis.conv, or this teacher")
            assert seen.keys() == (totals or seen).keys(), "the network ran different layers on two batches"
            totals = {key: totals.get(key, 0) + value.cpu().double() * len(images) for key, value in seen.items()}
            count += len(images)
    finally:
        for handle in handles:
            handle.remove()
    assert count, "expected at least one batch of real images"
    return {key: (total / count).float() for key, total in totals.items()}
