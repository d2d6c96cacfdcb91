"""Alignment: how far the statistics of a batch are from those that a frozen network has seen on real data.

Legend: B images, C channels, H W pixels, K classes.

Source: PRISM (arXiv 2511.09905), BN alignment; first in DeepInversion (arXiv 1912.08795). With mean and var per channel,
biased, and || || the L2 norm, not squared:

    R(f, x) = sum over BN layers    w_l * ( ||mean - running mean|| + ||var - running var|| )
            + sum over conv layers  ||each of four statistics - its average over the real training set||

The second sum, and a moving average of what is compared, are those of G-VBSM (arXiv 2311.17950).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from .statistics import STATISTICS, channel_statistics, conv_statistics


class Aligned(NamedTuple):
    """The result of one pass of a BN teacher: its logits (B, K), or `None` if the head was not run, and R."""

    logits: Tensor | None
    mismatch: Tensor


class _HeadNotNeeded(Exception):
    """Leaves a forward pass at the last layer that counts: nothing after it can change R."""


@dataclass
class _Pass:
    """One forward pass while it runs."""

    kept: list[bool]  # convolutions that take part in it
    last: int | None  # number of terms after which it may end; `None` runs to the end
    terms: list[Tensor] = field(default_factory=list)
    averages: dict[str, Tensor] = field(default_factory=dict)
    norms: int = 0
    convolutions: int = 0


class Alignment:
    """Computes R of a frozen network while it runs; its hooks live inside a `with` block.

    Args:
        model: A network in eval mode with at least one BatchNorm2d with running statistics.
        reduction: `sum` over layers, as published, or `mean`: over BN layers and convolutions, those left out too, so that
            leaving out does not raise the weight of the others.
        first_bn_multiplier: w of the first BN layer in order of execution; all other layers have 1.
        momentum: Share of the past in a moving average of the statistics, in [0, 1); 0 compares the batch itself.
        conv: What `gather_statistics` gave for this network and `patch`, or `None` for BN alone.
        drop: Each convolution is left out of a pass with this probability; its averages stay as they are then.
        generator: On the CPU, for `drop`; each pass takes one number per convolution from it, whatever `drop` is.

    Raises:
        TeacherError: Nothing to align. (The published code lets such a teacher dilute the average.) A pass raises it if
            `conv` does not fit its input.

    Example:
        >>> with Alignment(model) as align:
        ...     logits, mismatch = align(images)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: Literal["sum", "mean"] = "sum",
        first_bn_multiplier: float = 10.0,
        momentum: float = 0.0,
        conv: Mapping[str, Tensor] | None = None,
        patch: int = 16,
        drop: float = 0.0,
        generator: torch.Generator | None = None,
        name: str = "network",
    ) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
        if not norms:
            raise TeacherError(
                f"BN teacher {name!r} has no BatchNorm2d layer with running statistics, so it has nothing to align; "
                "remove it from teachers.bn_pool, or use it as teachers.logit with include_logit: false"
            )
        assert generator is not None or not drop, "leaving out convolutions needs a generator"
        self.model, self.reduction, self.first_bn_multiplier = model, reduction, first_bn_multiplier
        self.momentum, self.patch, self.drop, self.generator, self.name = momentum, patch, drop, generator, name
        assert norms[0].running_mean is not None
        self._device = norms[0].running_mean.device
        conv = {key: value.to(self._device) for key, value in (conv or {}).items()}
        counted = range(len(conv) // len(STATISTICS))
        self._targets = [{key: conv[f"{number}.{key}"] for key in STATISTICS} for number in counted]
        self._layers = [*norms, *(m for m in model.modules() if conv and isinstance(m, nn.Conv2d))]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._averages: dict[str, Tensor] = {}
        self._terms: int | None = None  # of one pass; known after the first
        self._pass: _Pass | None = None

    def __enter__(self) -> Self:
        self._handles = [layer.register_forward_pre_hook(self._see) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __call__(self, x: Tensor, *, head: bool = True) -> Aligned:
        """Run the network on x, (B, C, H, W), normalized as it expects; without `head` up to the last layer that counts."""
        assert self._handles, "Alignment is used inside a `with` block"
        kept = [True] * len(self._targets)
        if self.generator is not None:
            kept = (torch.rand(len(kept), generator=self.generator) >= self.drop).tolist()
        # The first pass always runs to the end: only then is it known how many layers are executed.
        self._pass = now = _Pass(kept, last=None if head else self._terms)
        logits: Tensor | None = None
        try:
            logits = self.model(x)
        except _HeadNotNeeded:
            pass
        finally:
            self._pass = None
        if now.convolutions != len(self._targets):
            raise self._misfit(f"there are {len(self._targets)}, and {now.convolutions} convolutions ran")
        self._terms = len(now.terms)
        self._averages.update(now.averages)
        total = torch.stack(now.terms).sum()
        return Aligned(logits if head else None, total / len(now.terms) if self.reduction == "mean" else total)

    def state(self) -> dict[str, Tensor]:
        """All moving averages by name; none before the first pass that succeeds, and none with momentum 0."""
        return dict(self._averages)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._averages = {key: value.to(self._device, copy=True) for key, value in state.items()}

    def _see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """The term of a layer that is about to run, from its input."""
        now = self._pass
        if now is None:
            return  # the network runs for something else, inside the block
        if isinstance(layer, nn.BatchNorm2d):
            batch = dict(zip(("mean", "var"), channel_statistics(inputs[0]), strict=True))
            target: dict[str, Any] = {"mean": layer.running_mean, "var": layer.running_var}
            term = self._distance(now, f"bn.{now.norms}", batch, target)
            if now.norms == 0:
                term = term * self.first_bn_multiplier
            now.norms += 1
        else:
            number = now.convolutions
            now.convolutions += 1
            if number >= len(self._targets):
                raise self._misfit(f"there are {len(self._targets)}, and more convolutions ran")
            term = torch.zeros((), device=self._device)
            if now.kept[number]:
                batch = conv_statistics(inputs[0], self.patch)
                term = self._distance(now, f"conv.{number}", batch, self._targets[number])
        now.terms.append(term)
        if len(now.terms) == now.last:
            raise _HeadNotNeeded

    def _distance(self, now: _Pass, layer: str, batch: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        """Sum of the L2 distances; at exactly zero PyTorch's norm has gradient zero, a subgradient."""
        norms = []
        for key, value in batch.items():
            if value.shape != target[key].shape:
                raise self._misfit(f"{layer}.{key} has {len(target[key])} numbers, the input gives {len(value)}")
            compared = self._smoothed(now, f"{layer}.{key}", value) if self.momentum else value
            norms.append((compared - target[key]).norm())
        return torch.stack(norms).sum()

    def _smoothed(self, now: _Pass, key: str, batch: Tensor) -> Tensor:
        """The average with this batch in it, which moves when the pass succeeds, with the gradient of the batch."""
        fixed, past = batch.detach(), self._averages.get(key)
        # differs: starts from the first batch. The published code means to, but a type check makes it start from zero.
        average = fixed if past is None else self.momentum * past + (1 - self.momentum) * fixed
        now.averages[key] = average
        return batch + (average - fixed)

    def _misfit(self, what: str) -> TeacherError:
        return TeacherError(
            f"teacher {self.name!r}: statistics of convolutions do not fit ({what}); gather them again for this network, "
            "input size and patch"
        )
