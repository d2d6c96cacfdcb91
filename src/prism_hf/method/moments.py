"""Moments: means and variances of a layer's input, and their distance to targets, with closed-form gradients.

Legend: B images, C channels, H W pixels, G cells of a feature map (about H / patch times W / patch).

The mean and variance over N values have the gradient

    d/dx = grad_mean / N + grad_var * 2 (x - mean) / N  =  offset + slope * x

so the backward pass of a layer needs only its input and two numbers per statistic. The network keeps the input in memory
anyway, so no activation is copied. `distance` computes the numbers of all layers at once, and passes them to the layers as
if they were gradients: hundreds of small operations would cost more than the convolutions of a small network. All
reductions run in at least float32.

Source: PRISM (arXiv 2511.09905), BN alignment; G-VBSM (arXiv 2311.17950), convolution statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EXACT = 2**13
"""Values over which the CPU's kernel for one channel is exact enough: the variance to 2e-6 of itself."""


_TINY = 1e-12
"""Smallest scale of a channel where a kernel divides by it; below it, the output of the layer does not change."""


class Moments(NamedTuple):
    """Mean and biased variance, (D,) each, and the number of values that divides their gradient. Only for `distance`."""

    mean: Tensor
    var: Tensor
    divisor: int


def _mean_var(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over all dimensions but the second: (N, D) or (N, D, L) -> (D,) each.

    On a CPU, the kernel of batch norm is several times faster than `torch.var_mean`.
    """
    if x.device.type == "cpu":
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    var, mean = torch.var_mean(x, dim=[d for d in range(x.ndim) if d != 1], correction=0)
    return mean, var


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, (B, C, ...) of any float dtype -> (C,) each, without a gradient."""
    if x.is_cuda and _is_channels_last(x):
        # Sums in float32. On an H100, twice as fast as `torch.var_mean`, and without a float32 copy of half precision.
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.device.type != "cpu":
        return _mean_var(x)
    channels, width = x.shape[1], x.shape[-1] if x.ndim > 2 else 1
    rows = x.movedim(1, -1)
    if x.numel() <= EXACT * channels:
        return _mean_var(rows.reshape(-1, channels))
    # Each column of the images by itself. Their mean variance plus the variance of their means is the variance of all.
    by_column = _mean_var(rows.reshape(-1, width * channels))
    mean, var = _mean_var(torch.cat([value.view(width, channels) for value in by_column], dim=1))
    return mean[:channels], mean[channels:] + var[:channels]


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not torch.compiler.is_compiling()


def cell_statistics(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each cell over batch, channels and pixels: (B, C, H, W) -> (rows, columns) each.

    `patch` is the side of a cell in pixels. The map is divided into max(1, H // patch) by max(1, W // patch) cells. If
    `patch` does not divide a side, the cells are larger, and neighbors may share a row or column of pixels.

    One pass over the input, and small sums over the (H, W) map: the variance of a cell is the mean of its pixels' variances
    plus the variance of its pixels' means.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, var = (value.view(x.shape[2:]) for value in _mean_var(x.permute(0, 2, 3, 1).flatten(1, 2)))
    cuts = _all_cuts(x, patch)
    # Center on the mean of the map first: with raw squares, the difference would lose precision to cancellation.
    middle = mean.mean()
    centered = mean - middle
    cell_mean = _pool(centered, *cuts)
    cell_var = _pool(var + centered.square(), *cuts) - cell_mean.square()
    return cell_mean + middle, cell_var


class _Norm(torch.autograd.Function):
    """A BN layer in eval mode and the statistics of its input, in one node: the backward pass reads the input once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, *layer: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, scale)
        mean, var, weight, bias, eps = layer
        y = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)
        return y, *channel_statistics(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, offset: Tensor, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        return _gradient(x, grad_y, scale, offset, slope), *[None] * 6


def _gradient(x: Tensor, grad_y: Tensor, scale: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
    """Return `offset + slope * x + scale * grad_y`, whose numbers per channel are (C,) in at least float32."""
    if x.is_cuda and _is_channels_last(x) and _is_channels_last(grad_y):
        # The kernel of synchronized batch norm computes (grad_y - a - (x - 0) * b * 1) * scale in one pass.
        scale = torch.where(scale.abs() < _TINY, _TINY, scale)
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        count = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(grad_y, x, zero, one, scale, offset / -scale, slope / -scale, count)
    shape = (1, -1, *[1] * (x.ndim - 2))
    # In half precision, the two terms of the statistics would suffer from cancellation.
    gradient = torch.addcmul(offset.view(shape), slope.view(shape), x.to(slope.dtype))
    return gradient.addcmul_(grad_y, scale.view(shape)).to(x.dtype)


class _ChannelStatistics(torch.autograd.Function):
    """The statistics of each channel in one node: the backward pass reads the input once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return channel_statistics(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, offset: Tensor, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        shape = (1, -1, *[1] * (x.ndim - 2))
        return torch.addcmul(offset.view(shape), slope.view(shape), x.to(slope.dtype)).to(x.dtype)


class _ConvStatistics(torch.autograd.Function):
    """The four statistics of a convolution's input in one node: the backward pass reads the input once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, patch: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.patch = patch
        return *channel_statistics(x), *(value.flatten() for value in cell_statistics(x, patch))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, offset: Tensor, slope: Tensor, *of_cells: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        # The transpose of pooling gives each pixel its share of every cell that contains it; cells may overlap.
        rows, columns = (cuts.T for cuts in _all_cuts(x, ctx.patch))
        offset, slope = (
            channel.view(-1, 1, 1) + _pool(cell.view(rows.shape[1], columns.shape[1]), rows, columns)
            for channel, cell in zip((offset, slope), of_cells, strict=True)
        )
        gradient = torch.empty_like(x, dtype=slope.dtype)  # else the layout would be that of the offset
        return torch.addcmul(offset, slope, x.to(slope.dtype), out=gradient).to(x.dtype), None


class _Distance(torch.autograd.Function):
    """The weighted sum of the L2 norms of many differences, in a few operations on all of them."""

    @staticmethod
    def forward(ctx: Any, targets: "Targets", compared: Tensor, *statistics: Tensor) -> Tensor:
        difference = compared - targets.values
        table = difference.new_zeros(2, len(targets.sizes) * max(targets.sizes))
        norms = table.index_copy_(1, targets.places, difference).view(2, len(targets.sizes), -1).norm(dim=2)
        ctx.targets = targets
        ctx.save_for_backward(difference, norms, *statistics[::2])
        return norms.sum(0) @ targets.weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        difference, norms, *means = ctx.saved_tensors
        targets = ctx.targets
        # At a norm of exactly zero, the gradient is zero, a valid subgradient.
        unit = torch.where(norms > 0, grad * targets.weights / norms, 0).index_select(1, targets.rows) * difference
        slope = unit[1] * (2 / targets.counts)
        offset = torch.addcmul(unit[0] / targets.counts, slope, torch.cat(means), value=-1)
        both = zip(offset.split(targets.sizes), slope.split(targets.sizes), strict=True)
        return None, None, *(value for pair in both for value in pair)


@dataclass(frozen=True, eq=False)
class Targets:
    """The constants of `distance` on the device. N is the number of all means, E that of the `Moments`.

    Attributes:
        sizes, divisors: Number of values of each of the moments, and their divisors.
        values: Target means and variances, (2, N).
        weights: Weight of each distance, (E,).
        counts: Divisor of each mean, (N,).
        rows, places: Number of the moments that a value belongs to, and its place in a table with a row for each, (N,).
    """

    sizes: list[int]
    divisors: list[int]
    values: Tensor
    weights: Tensor
    counts: Tensor
    rows: Tensor
    places: Tensor

    @classmethod
    def of(cls, batch: Sequence[Moments], targets: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Self:
        """Return the constants for moments of this form."""
        sizes, divisors = [len(moments.mean) for moments in batch], [moments.divisor for moments in batch]
        values = torch.stack([torch.cat(list(part)) for part in zip(*targets, strict=True)])
        rows = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        places = torch.cat([torch.arange(size) + max(sizes) * row for row, size in enumerate(sizes)])
        device = values.device
        counts = values.new_tensor(divisors)[rows.to(device)]
        return cls(sizes, divisors, values, values.new_tensor(weights), counts, rows.to(device), places.to(device))

    def fit(self, batch: Sequence[Moments]) -> bool:
        """Return whether the constants are for moments of this form."""
        return all(
            (len(moments.mean), moments.divisor) == form
            for moments, form in zip(batch, zip(self.sizes, self.divisors, strict=True), strict=False)
        ) and len(batch) == len(self.sizes)


def distance(batch: Sequence[Moments], targets: Targets, compared: Tensor | None = None) -> Tensor:
    """Return the weighted sum of ||mean - target mean|| + ||var - target var||, a scalar; || || is the L2 norm.

    `compared`, (2, N), has the values to compare in place of those of the batch, such as a moving average. The gradient is
    then that of the batch alone (straight-through).
    """
    statistics = [value for moments in batch for value in (moments.mean, moments.var)]
    if compared is None:
        compared = stacked(batch)
    total: Tensor = _Distance.apply(targets, compared, *statistics)
    return total


def stacked(batch: Sequence[Moments]) -> Tensor:
    """Return all means and variances, (2, N), without a gradient."""
    return torch.stack([torch.cat([m.mean.detach() for m in batch]), torch.cat([m.var.detach() for m in batch])])


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


def _all_cuts(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Return the matrices of `_cuts` along both sides of a feature map."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, columns = (_cuts(side, patch, dtype, x.device) for side in x.shape[2:])
    return rows, columns


def frozen_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    scale: Tensor,
) -> tuple[Tensor, Moments]:
    """Return the output of a BN layer in eval mode, and the moments of each channel of its input.

    The input is (B, C, ...) of any float dtype; the other arguments are running statistics and parameters of the layer,
    which get no gradient, and `scale`, weight / sqrt(var + eps). The output equals that of the layer bit for bit.
    """
    y, batch_mean, batch_var = _Norm.apply(x, scale, mean, var, weight, bias, eps)
    return y, Moments(batch_mean, batch_var, x.numel() // x.shape[1])


def channel_moments(x: Tensor) -> Moments:
    """Return the moments of each channel of an input, (B, C, ...) of any float dtype."""
    mean, var = _ChannelStatistics.apply(x)
    return Moments(mean, var, x.numel() // x.shape[1])


def conv_moments(x: Tensor, patch: int) -> tuple[Moments, Moments]:
    """Return the moments of each channel of a convolution's input, and those of each cell; see `cell_statistics`.

    The input is (B, C, H, W) of any float dtype; the moments have C and G values.
    """
    mean, var, cell_mean, cell_var = _ConvStatistics.apply(x, patch)
    per_channel, per_pixel = counts_of(x)
    return Moments(mean, var, per_channel), Moments(cell_mean, cell_var, per_pixel)


def counts_of(x: Tensor) -> tuple[int, int]:
    """Return the divisors of both moments of a convolution's input; pooling divides by the number of pixels of a cell."""
    return x.numel() // x.shape[1], x.shape[0] * x.shape[1]
