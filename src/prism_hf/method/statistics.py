"""Averages over real data of the statistics of layer inputs, for layers that keep no running statistics.

Legend: B images, C channels, H W pixels, N tokens, G cells of a feature map (about H / patch times W / patch).

Source: G-VBSM (arXiv 2311.17950), convolution statistics. Statistics of the inputs of layer norms and group norms, for
teachers without batch norm, are ours.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of 1d, 2d, 3d and synchronized BN

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


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a network has batch norms with running statistics, which are then its statistics."""
    return any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())


def data_norms(model: nn.Module) -> list[nn.Module]:
    """Return the layer norms and group norms of a network without batch norm; empty for one that has it."""
    if has_batch_norm(model):
        return []
    return [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)]


def channels_second(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the input of a layer norm or group norm as (B, C, ...): tokens (B, N, C) and (B, H, W, C) are transposed."""
    is_map = isinstance(layer, nn.GroupNorm) or "2d" in type(layer).__name__  # timm's LayerNorm2d takes (B, C, H, W)
    return x if is_map else x.movedim(-1, 1)


@torch.no_grad()
def gather_norms(teacher: Teacher, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Average the statistics of the inputs of `data_norms` over real batches, (B, C, H, W) uint8, weighted by batch size.

    Returns:
        `norm.N.mean` and `norm.N.var` (C,), float32 on the CPU. N numbers the layers in execution order; a layer that runs
        twice counts twice. The variance is biased, over the batch and all positions, like that of a batch norm.
    """
    return _averages(teacher, batches, data_norms(teacher.model), _norm_statistics)


def _norm_statistics(layer: nn.Module, x: Tensor, number: int) -> dict[str, Tensor]:
    mean, var = channel_statistics(channels_second(layer, x))
    return {f"norm.{number}.mean": mean, f"norm.{number}.var": var}


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

    def statistics(_: nn.Module, x: Tensor, number: int) -> dict[str, Tensor]:
        return {f"{number}.{key}": value for key, value in conv_statistics(x, patch).items()}

    layers = [layer for layer in teacher.model.modules() if isinstance(layer, nn.Conv2d)]
    if not layers:
        raise TeacherError(f"teacher {teacher.name!r} has no Conv2d layer; remove synthesis.conv, or this teacher")
    return _averages(teacher, batches, layers, statistics)


def _averages(
    teacher: Teacher,
    batches: Iterable[Tensor],
    layers: Sequence[nn.Module],
    statistics: Callable[[nn.Module, Tensor, int], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Average `statistics(layer, input, number)` of all layers that run, numbered in execution order, over real batches."""
    seen: dict[str, Tensor] = {}
    ran = 0

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal ran
        seen.update(statistics(layer, inputs[0], ran))
        ran += 1

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    count, totals = 0, dict[str, Tensor]()
    try:
        for images in batches:
            ran = 0
            seen.clear()
            teacher.logits(to_reference(images.to(teacher.device)))
            assert seen.keys() == (totals or seen).keys(), "the network ran different layers on two batches"
            totals = {key: totals.get(key, 0) + value.cpu().double() * len(images) for key, value in seen.items()}
            count += len(images)
    finally:
        for handle in handles:
            handle.remove()
    assert count, "expected at least one batch of real images"
    return {key: (total / count).float() for key, total in totals.items()}
