"""Means and variances of a layer's input, with their gradients in closed form, and their averages over real data.

Legend: B images, C channels, H W pixels, G cells of a map (about H / patch times W / patch).

A mean and a variance over N values have the gradient

    d/dx = grad_mean / N + grad_var * 2 (x - mean) / N  =  offset + slope * x

so only the layer's input is saved, which the network keeps alive anyway: no copy of an activation. Everything is reduced
in float32 at least.

Source: G-VBSM (arXiv 2311.17950), statistics of convolutions.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import TeacherError
from ..images import to_reference
from ..models import Teacher

STATISTICS = ("channel_mean", "channel_var", "patch_mean", "patch_var")
"""What is matched of a convolution's input."""
BATCH_SIZE = 250
"""Real images per pass. A variance depends on who shares a batch, so it is not left to the machine."""


class _ChannelStatistics(torch.autograd.Function):
    """Mean and variance per channel: N = B * H * W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(0, 2, 3), correction=0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = grad_var * (2 / count)
        offset = grad_mean / count - slope * mean
        return _gradient(offset.view(1, -1, 1, 1), slope.view(1, -1, 1, 1), x)


class _PatchStatistics(torch.autograd.Function):
    """Mean and variance per cell, in one pass over the input and small sums over the map.

    The variance of a cell is the mean of its pixels' variances plus the variance of its pixels' means.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(0, 1), correction=0)
        ctx.cuts = [_cuts(side, patch, mean.dtype, mean.device) for side in mean.shape]
        # Around the mean of the map: squares of the values themselves would cancel.
        middle = mean.mean()
        centered = mean - middle
        cell_mean = _pool(centered, *ctx.cuts)
        cell_var = _pool(var + centered.square(), *ctx.cuts) - cell_mean.square()
        cell_mean = cell_mean + middle
        ctx.save_for_backward(x, cell_mean)
        return cell_mean.flatten(), cell_var.flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None]:
        x, cell_mean = ctx.saved_tensors
        per_map = x.shape[0] * x.shape[1]
        slope = 2 * grad_var.view_as(cell_mean) / per_map
        offset = grad_mean.view_as(cell_mean) / per_map - slope * cell_mean
        # The transpose of pooling gives each pixel its share of every cell that it is in: cells may overlap.
        rows, columns = (cuts.T for cuts in ctx.cuts)
        return _gradient(_pool(offset, rows, columns), _pool(slope, rows, columns), x), None


def _gradient(offset: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """`offset + slope * x` in one pass over x, instead of centering first.

    In the dtype of the statistics: rounded to half precision, the two terms would cancel badly.
    """
    return torch.addcmul(offset, slope, x.to(slope.dtype)).to(x.dtype)


@lru_cache(maxsize=256)
def _cuts(side: int, patch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which pixels of a side are in which cell, (cells, side): rows sum to 1, cut as adaptive average pooling cuts."""
    cells = max(1, side // patch)
    cell, pixel = torch.arange(cells)[:, None], torch.arange(side)
    start, stop = cell * side // cells, ((cell + 1) * side + cells - 1) // cells
    inside = ((pixel >= start) & (pixel < stop)).to(dtype)
    return (inside / inside.sum(1, keepdim=True)).to(device)


def _pool(grid: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ grid @ columns.T` with all digits: products of matrices may be rounded (autocast, TF32)."""
    return ((rows[:, :, None] * grid).sum(1)[:, None, :] * columns).sum(2)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a layer's input: (B, C, H, W) of any float dtype -> (C,) each."""
    mean, var = _ChannelStatistics.apply(x)
    return mean, var


def patch_statistics(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each cell of a layer's input, over batch, channels and pixels: (B, C, H, W) -> (G,) each.

    `patch` is the side of a cell in pixels. There are max(1, H // patch) by max(1, W // patch) cells, row by row. They
    cover the map, so where the side is not a multiple they are larger, and may share a pixel at their border.
    """
    mean, var = _PatchStatistics.apply(x, patch)
    return mean, var


def conv_statistics(x: Tensor, patch: int) -> dict[str, Tensor]:
    """All four statistics of a convolution's input by name."""
    return dict(zip(STATISTICS, (*channel_statistics(x), *patch_statistics(x, patch)), strict=True))


def shuffled_batches(
    images: Callable[[Tensor], Tensor], count: int, *, seed: int, batch_size: int = BATCH_SIZE
) -> Iterator[Tensor]:
    """All `count` real images in batches that mix the classes, each image once, in an order of the seed.

    `images` gives rows: (B,) int64 -> (B, C, H, W) uint8.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (images(rows) for rows in order.split(batch_size))


@torch.no_grad()
def gather_statistics(teacher: Teacher, batches: Iterable[Tensor], *, patch: int) -> dict[str, Tensor]:
    """Average the statistics of every convolution's input over batches of real images, (B, C, H, W) uint8, by their size.

    Returns:
        `N.channel_mean`, `N.channel_var` (C,), `N.patch_mean` and `N.patch_var` (G,), float32 on the CPU; N counts the
        convolutions in order of execution, and one that runs twice counts twice.

    Raises:
        TeacherError: The network runs no Conv2d.
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
                raise TeacherError(f"teacher {name!r} has no Conv2d layer; leave out synthesis.conv, or this teacher")
            assert seen.keys() == (totals or seen).keys(), "a network runs the same layers on every batch"
            totals = {key: totals.get(key, 0) + value.cpu().double() * len(images) for key, value in seen.items()}
            count += len(images)
    finally:
        for handle in handles:
            handle.remove()
    assert count, "there are real images"
    return {key: (total / count).float() for key, total in totals.items()}
