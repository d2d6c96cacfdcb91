"""Statistics: means and variances of a layer's input, with closed-form gradients, and their averages over real data.

Legend: B images, C channels, H W pixels, G cells of a feature map (about H / patch times W / patch).

The mean and variance over N values have the gradient

    d/dx = grad_mean / N + grad_var * 2 (x - mean) / N  =  offset + slope * x

so the backward pass needs only the layer's input. The network keeps that in memory anyway, so no activation is copied. All
reductions run in at least float32.

Source: G-VBSM (arXiv 2311.17950), convolution statistics.
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
"""The statistics of a convolution's input that are matched."""
BATCH_SIZE = 250
"""Real images per pass. It is fixed for all machines, because the variance of a batch depends on which images share it."""


class _ChannelStatistics(torch.autograd.Function):
    """Mean and variance per channel, over N = B * H * W values."""

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
    """Mean and variance per cell, computed in one pass over the input and small sums over the (H, W) map.

    The variance of a cell is the mean of its pixels' variances plus the variance of its pixels' means.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(0, 1), correction=0)
        ctx.cuts = [_cuts(side, patch, mean.dtype, mean.device) for side in mean.shape]
        # Center on the mean of the map first: with raw squares, the difference would lose precision to cancellation.
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
        # The transpose of pooling gives each pixel its share of every cell that contains it; cells may overlap.
        rows, columns = (cuts.T for cuts in ctx.cuts)
        return _gradient(_pool(offset, rows, columns), _pool(slope, rows, columns), x), None


def _gradient(offset: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """Return `offset + slope * x` in one pass over x, without centering x first.

    The sum uses the dtype of the statistics, because in half precision the two terms would suffer from cancellation.
    """
    return torch.addcmul(offset, slope, x.to(slope.dtype)).to(x.dtype)


@lru_cache(maxsize=256)
def _cuts(side: int, patch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix of adaptive average pooling along one side, (cells, side); rows sum to 1."""
    cells = max(1, side // patch)
    cell, pixel = torch.arange(cells)[:, None], torch.arange(side)
    start, stop = cell * side // cells, ((cell + 1) * side + cells - 1) // cells
    inside = ((pixel >= start) & (pixel < stop)).to(dtype)
    return (inside / inside.sum(1, keepdim=True)).to(device)


def _pool(grid: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return `rows @ grid @ columns.T` in full precision; autocast and TF32 would round matrix products."""
    return ((rows[:, :, None] * grid).sum(1)[:, None, :] * columns).sum(2)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel of a layer's input: (B, C, H, W) of any float dtype -> (C,) each."""
    mean, var = _ChannelStatistics.apply(x)
    return mean, var


def patch_statistics(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each cell, over batch, channels and pixels: (B, C, H, W) -> (G,) each.

    `patch` is the side of a cell in pixels. The map is divided into max(1, H // patch) by max(1, W // patch) cells, row by
    row. If `patch` does not divide a side, the cells are larger, and neighbors may share a row or column of pixels.
    """
    mean, var = _PatchStatistics.apply(x, patch)
    return mean, var


def conv_statistics(x: Tensor, patch: int) -> dict[str, Tensor]:
    """Return all four statistics of a convolution's input by name."""
    return dict(zip(STATISTICS, (*channel_statistics(x), *patch_statistics(x, patch)), strict=True))


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
