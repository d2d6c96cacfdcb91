"""How far a batch's statistics are from those a network's BatchNorm layers learned on real data.

Legend: B images, C channels, H W pixels, L BatchNorm2d layers.

Source: PRISM (arXiv 2511.09905), BN alignment R_bn; first in DeepInversion (arXiv 1912.08795):

    R_bn(f, x) = sum_l w_l * ( ||mu_l(x) - mean_l||_2 + ||var_l(x) - var_l||_2 )
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import TeacherError

Reduction = Literal["sum", "mean"]


class _ChannelMismatch(torch.autograd.Function):
    """||mu - mean|| + ||var - var_running||, with its gradient in closed form.

    Only the layer's input is saved, which the network keeps alive anyway: no copy of an activation. With u the unit vector
    of a difference, N = B * H * W: d/dx = u_mean / N + u_var * 2 (x - mu) / N. At a difference of exactly zero the norm has
    no gradient; we take zero, a subgradient, as PyTorch's own norm does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        batch_var, batch_mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        difference_mean, difference_var = batch_mean - mean, batch_var - var
        norm_mean, norm_var = difference_mean.norm(), difference_var.norm()
        unit_mean = torch.where(norm_mean > 0, difference_mean / norm_mean, 0)
        unit_var = torch.where(norm_var > 0, difference_var / norm_var, 0)
        ctx.save_for_backward(x, batch_mean, unit_mean, unit_var)
        return norm_mean + norm_var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, batch_mean, unit_mean, unit_var = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = grad * unit_var * (2 / count)
        offset = grad * unit_mean / count - slope * batch_mean
        shape = (1, -1, 1, 1)
        # One pass over x: offset + slope * x, instead of centring first.
        # In the dtype of the statistics: rounded to half precision, the two terms would cancel badly.
        return torch.addcmul(offset.view(shape), slope.view(shape), x.to(slope.dtype)).to(x.dtype), None, None


def channel_mismatch(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """How far one batch's channel statistics are from those `norm` learned on real data.

    Args:
        x: Input of the layer, (B, C, H, W), any float dtype; reduced in float32 at least.
        norm: A frozen layer; its running statistics, each (C,), are the target.

    Returns:
        Scalar: L2 distance of the means plus L2 distance of the biased variances, neither squared.

    Source: PRISM (arXiv 2511.09905), BN alignment; after DeepInversion's feature regulariser.
    """
    return _ChannelMismatch.apply(x, norm.running_mean, norm.running_var)


class Aligned(NamedTuple):
    """What one forward pass of a BN teacher gives: its logits (B, K), or None if the head was not run, and R_bn."""

    logits: Tensor | None
    mismatch: Tensor


class HeadNotNeeded(Exception):
    """Leaves a forward pass at the last BatchNorm2d: what comes after it cannot change R_bn."""


class BNAlignment:
    """Collects R_bn of a frozen network while it runs; its hooks live inside a `with` block.

    Args:
        model: A network in eval mode with at least one BatchNorm2d with running statistics.
        reduction: `sum` over layers, as published, or `mean` over layers.
        first_bn_multiplier: w of the first layer in order of execution; the others have 1.
        name: Names the network in errors.

    Raises:
        TeacherError: No BatchNorm2d with running statistics: nothing to align. (The published code lets such a teacher
            dilute the average.)

    Example:
        >>> with BNAlignment(model) as align:
        ...     logits, mismatch = align(images)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: Reduction = "sum",
        first_bn_multiplier: float = 10.0,
        name: str = "network",
    ) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
        if not self._layers:
            raise TeacherError(
                f"BN teacher {name!r} has no BatchNorm2d layer with running statistics, so it has nothing to align; "
                "remove it from teachers.bn_pool, or use it as teachers.logit with include_logit: false"
            )
        self.model = model
        self.reduction = reduction
        self.first_bn_multiplier = first_bn_multiplier
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._terms: list[Tensor] = []
        self._calls: int | None = None
        self._skip_head = False

    def __enter__(self) -> BNAlignment:
        self._handles = [layer.register_forward_pre_hook(self._record) for layer in self._layers]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __call__(self, x: Tensor, *, head: bool = True) -> Aligned:
        """Run the network on its own kind of input.

        Args:
            x: (B, C, H, W), normalised as the network expects.
            head: Whether the logits are needed; without them the pass ends at the last BatchNorm2d.
        """
        assert self._handles, "BNAlignment is used inside a `with` block"
        self._terms = []
        # The first pass always runs to the end: only then is it known how many layers are executed, and in which order.
        self._skip_head = not head and self._calls is not None
        logits: Tensor | None = None
        try:
            logits = self.model(x)
        except HeadNotNeeded:
            pass
        self._calls = self._calls or len(self._terms)
        terms, self._terms = self._terms, []
        weighted = [terms[0] * self.first_bn_multiplier, *terms[1:]]
        total = torch.stack(weighted).sum()
        return Aligned(logits if head else None, total / len(terms) if self.reduction == "mean" else total)

    def _record(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        self._terms.append(channel_mismatch(inputs[0], layer))
        if self._skip_head and len(self._terms) == self._calls:
            raise HeadNotNeeded
