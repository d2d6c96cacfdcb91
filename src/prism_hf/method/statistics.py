"""Statistics of convolution inputs on real data, and how far a batch is from them and from those of BatchNorm layers.

Legend: B images, C channels, H W pixels, G cells of a map (about H / patch times W / patch).

Source: G-VBSM (arXiv 2311.17950). With mean and var per channel (C,) and per cell (G,), biased, and || || the L2 norm:

    R(f, x) = sum over BN layers    w_l * ( ||mean - running_mean|| + ||var - running_var|| )
            + sum over conv layers  ||four statistics of the batch - their averages over the real training set||

Each statistic of the batch may be smoothed by a moving average: its value is compared, the gradient is that of the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import TeacherError
from ..images.pixels import to_reference
from ..models.teacher import Teacher
from ..runtime.memory import told_in_one_line
from ..runtime.stop import raise_if_stopped
from .alignment import Aligned, BNAlignment, HeadNotNeeded, Reduction

log = logging.getLogger(__name__)
STATISTICS = ("channel_mean", "channel_var", "patch_mean", "patch_var")
BATCH_SIZE = 250
"""Real images per pass. A variance depends on who shares a batch, so it is not left to the machine."""
Images = Callable[[Tensor], Tensor]
"""Rows, (B,) int64 -> (B, C, H, W) uint8."""


# -- statistics of one batch ------------------------------------------------------------------------------------------


class _ChannelStatistics(torch.autograd.Function):
    """Mean and variance per channel. Saved is only the layer's input, which the network keeps alive anyway.

    With N = B * H * W: d/dx = grad_mean / N + grad_var * 2 (x - mean) / N.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(_wide(x), dim=(0, 2, 3), correction=0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = grad_var * (2 / count)
        offset = grad_mean / count - slope * mean
        shape = (1, -1, 1, 1)
        return torch.addcmul(offset.view(shape), slope.view(shape), x.to(slope.dtype)).to(x.dtype)


class _PatchStatistics(torch.autograd.Function):
    """Mean and variance per cell, in one pass over the input and small sums over the map; see `_ChannelStatistics`.

    The variance of a cell is the mean of its pixels' variances plus the variance of its pixels' means.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(_wide(x), dim=(0, 1), correction=0)
        ctx.cuts = [_cuts(side, patch, mean.dtype, mean.device) for side in mean.shape]
        # Around the mean of the map: squares of the values themselves would cancel.
        middle = mean.mean()
        centred = mean - middle
        cell_mean = _pool(centred, *ctx.cuts)
        cell_var = _pool(var + centred.square(), *ctx.cuts) - cell_mean.square()
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
        slope, offset = _pool(slope, rows, columns), _pool(offset, rows, columns)
        return torch.addcmul(offset, slope, x.to(slope.dtype)).to(x.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


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
    """Mean and biased variance of each channel, (C,) each.

    Args:
        x: Input of a layer, (B, C, H, W), any float dtype; reduced in float32 at least.
    """
    mean, var = _ChannelStatistics.apply(x)
    return mean, var


def patch_statistics(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each cell of the map, over batch, channels and the cell's pixels, (G,) each.

    Args:
        x: Input of a layer, (B, C, H, W), any float dtype; reduced in float32 at least.
        patch: Side of a cell in pixels. There are max(1, H // patch) by max(1, W // patch) cells, row by row; they cover
            the map, so where the side is no multiple they are larger, and may share a pixel at their border.

    Source: G-VBSM (arXiv 2311.17950), patch statistics of convolutions.
    """
    mean, var = _PatchStatistics.apply(x, patch)
    return mean, var


def conv_statistics(x: Tensor, patch: int) -> dict[str, Tensor]:
    """All four statistics of a convolution's input by name; see `channel_statistics` and `patch_statistics`."""
    return dict(zip(STATISTICS, (*channel_statistics(x), *patch_statistics(x, patch)), strict=True))


# -- statistics of the real data --------------------------------------------------------------------------------------


@torch.no_grad()
def gather_statistics(
    teacher: Teacher, images: Images, count: int, *, patch: int, seed: int, batch_size: int = BATCH_SIZE
) -> dict[str, Tensor]:
    """Average the statistics of every convolution's input over the real training images, each seen once.

    Args:
        teacher: The network, on the device to compute on.
        images: The real images by row.
        count: How many there are.
        patch: See `patch_statistics`.
        seed: Of the order of the rows: batches must mix the classes.
        batch_size: Images per pass. Averaged are the statistics of batches, weighted by their size.

    Returns:
        `N.channel_mean`, `N.channel_var` (C,), `N.patch_mean` and `N.patch_var` (G,), float32 on the CPU; N counts the
        convolutions in order of execution, and one that runs twice counts twice.

    Raises:
        TeacherError: The network runs no Conv2d.
        DeviceMemoryError: A batch does not fit.
        StoppedError: Somebody asked the program to stop.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    sums: Tensor | None = None
    shapes: dict[str, int] = {}
    what = f"teacher {teacher.name!r}: a batch of {min(batch_size, count)} real images for statistics of convolutions"
    with _recorded(teacher.model, patch) as found, told_in_one_line(what, "Use a device with more memory"):
        for rows in order.split(batch_size):
            raise_if_stopped()
            found.clear()
            teacher.logits(to_reference(images(rows).to(teacher.device)))
            if not found:
                raise TeacherError(
                    f"teacher {teacher.name!r} has no Conv2d layer; leave out synthesis.conv, or this teacher"
                )
            sizes = {key: len(value) for key, value in found.items()}
            assert sizes == (shapes or sizes), "a network runs the same layers on every batch"
            shapes = sizes
            # One vector: one copy from the device per batch.
            weighted = torch.cat(list(found.values())).cpu().double() * len(rows)
            sums = weighted if sums is None else sums + weighted
    assert sums is not None, "there are real images"
    parts = (sums / count).float().split(list(shapes.values()))
    return {key: part.clone() for key, part in zip(shapes, parts, strict=True)}


@contextmanager
def _recorded(model: nn.Module, patch: int) -> Iterator[dict[str, Tensor]]:
    """A dict that each pass inside the block fills; whoever starts a pass empties it."""
    found: dict[str, Tensor] = {}

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        number = len(found) // len(STATISTICS)
        found.update({f"{number}.{key}": value for key, value in conv_statistics(inputs[0], patch).items()})

    handles = [layer.register_forward_pre_hook(record) for layer in _convolutions(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


# -- the mismatch -----------------------------------------------------------------------------------------------------


class MovingAlignment(BNAlignment):
    """R of a frozen network while it runs: BN statistics, convolution statistics, and moving averages of both.

    It is used as `BNAlignment` is, and without averages and convolutions it is the same. Its averages are its own, and move
    only when a pass has succeeded: teachers that take turns each have their own past.

    Args:
        model: A network in eval mode with at least one BatchNorm2d with running statistics.
        momentum: Share of the past in an average, in [0, 1); 0 compares the batch itself.
        conv: What `gather_statistics` gave for this network, or `None` for BN alone.
        patch: As it was for `conv`.
        drop: Each convolution is left out of a pass with this probability; its averages stay as they are then.
        reduction: `sum` over layers, or `mean` over layers: BN layers and convolutions, those left out too, so that leaving
            out does not raise the weight of the others.
        first_bn_multiplier: w of the first BN layer in order of execution; all other layers have 1.
        name: Names the network in errors.
        generator: On the CPU, for `drop`; each pass takes one number per convolution from it, whatever `drop` is.

    Raises:
        TeacherError: No BatchNorm2d with running statistics. A pass raises it if `conv` does not fit its input.

    Source: G-VBSM (arXiv 2311.17950).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: float = 0.0,
        conv: Mapping[str, Tensor] | None = None,
        patch: int = 16,
        drop: float = 0.0,
        reduction: Reduction = "sum",
        first_bn_multiplier: float = 10.0,
        name: str = "network",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, reduction=reduction, first_bn_multiplier=first_bn_multiplier, name=name)
        assert generator is not None or not drop, "leaving out convolutions needs a generator"
        self.momentum, self.patch, self.drop, self.name, self.generator = momentum, patch, drop, name, generator
        running_mean = self._layers[0].running_mean
        assert running_mean is not None
        self._device = running_mean.device
        conv = conv or {}
        self._targets = [
            {key: conv[f"{number}.{key}"].to(self._device) for key in STATISTICS}
            for number in range(len(conv) // len(STATISTICS))
        ]
        self._averages: dict[str, Tensor] = {}
        self._moved: dict[str, Tensor] = {}
        self._kept = [True] * len(self._targets)
        self._bn_calls = self._conv_calls = 0
        self._running = False

    def __enter__(self) -> MovingAlignment:
        super().__enter__()
        if self._targets:
            self._handles += [c.register_forward_pre_hook(self._record_conv) for c in _convolutions(self.model)]
        return self

    def __call__(self, x: Tensor, *, head: bool = True) -> Aligned:
        """Run the network on its own kind of input.

        Args:
            x: (B, C, H, W), normalised as the network expects.
            head: Whether the logits are needed; without them the pass ends at the last BatchNorm2d or convolution.
        """
        assert self._handles, "MovingAlignment is used inside a `with` block"
        self._begin()
        # The first pass always runs to the end: only then is it known how many layers are executed.
        self._skip_head = not head and self._calls is not None
        logits: Tensor | None = None
        self._running = True
        try:
            logits = self.model(x)
        except HeadNotNeeded:
            pass
        finally:
            self._running = False
        if self._conv_calls != len(self._targets):
            raise self._misfit(f"there are {len(self._targets)}, and {self._conv_calls} convolutions ran")
        self._calls = self._calls or len(self._terms)
        self._averages.update(self._moved)
        terms, self._terms = self._terms, []  # nothing of the graph stays alive here
        total = torch.stack(terms).sum()
        return Aligned(logits if head else None, total / len(terms) if self.reduction == "mean" else total)

    def _begin(self) -> None:
        """Forget what the last pass left, and draw which convolutions take part in this one."""
        self._terms, self._moved = [], {}
        self._bn_calls = self._conv_calls = 0
        if self.generator is not None:
            self._kept = (torch.rand(len(self._targets), generator=self.generator) >= self.drop).tolist()

    def state(self) -> dict[str, Tensor]:
        """All averages by name, for a checkpoint; none before the first pass, and none with momentum 0."""
        return dict(self._averages)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._averages = {key: value.to(self._device, copy=True) for key, value in state.items()}

    def _record(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self._running:
            return  # somebody else asks the network, inside the block
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, var = channel_statistics(inputs[0])
        target = {"mean": layer.running_mean, "var": layer.running_var}
        distance = self._distance(f"bn.{self._bn_calls}", {"mean": mean, "var": var}, target)
        self._terms.append(distance * (1.0 if self._bn_calls else self.first_bn_multiplier))
        self._bn_calls += 1
        self._leave_if_last()

    def _record_conv(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self._running:
            return
        number, x = self._conv_calls, inputs[0]
        self._conv_calls += 1
        if number >= len(self._targets):
            raise self._misfit(f"there are {len(self._targets)}, and more convolutions ran")
        if self._kept[number]:
            self._terms.append(self._distance(f"conv.{number}", conv_statistics(x, self.patch), self._targets[number]))
        else:
            self._terms.append(_wide(x).new_zeros(()))
        self._leave_if_last()

    def _leave_if_last(self) -> None:
        if self._skip_head and len(self._terms) == self._calls:
            raise HeadNotNeeded

    def _distance(self, layer: str, batch: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        """Sum of the L2 distances; PyTorch's norm has gradient zero at exactly zero."""
        for key, value in batch.items():
            if value.shape != target[key].shape:
                raise self._misfit(f"{layer}.{key} has {len(target[key])} numbers, the input gives {len(value)}")
        norms = [(self._smoothed(f"{layer}.{key}", value) - target[key]).norm() for key, value in batch.items()]
        return torch.stack(norms).sum()

    def _smoothed(self, key: str, batch: Tensor) -> Tensor:
        """The average with this batch in it, with the gradient of the batch (straight through)."""
        if not self.momentum:
            return batch
        fixed, past = batch.detach(), self._averages.get(key)
        # differs: starts from the first batch. The published code means to, but a type check makes it start from zero.
        now = fixed if past is None else self.momentum * past + (1 - self.momentum) * fixed
        self._moved[key] = now
        return batch + (now - fixed)

    def _misfit(self, what: str) -> TeacherError:
        return TeacherError(
            f"teacher {self.name!r}: statistics of convolutions do not fit ({what}); gather them again for this network, "
            "input size and patch"
        )
