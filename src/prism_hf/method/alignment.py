"""BN alignment: the distance between the feature statistics of a batch and those of real data in a frozen network.

Legend: B images, C channels, H W pixels, K classes.

Source: PRISM (arXiv 2511.09905), BN alignment, introduced by DeepInversion (arXiv 1912.08795). The mean and the biased
variance are per channel, and || || is the L2 norm, not squared:

    R(f, x) = sum over BN layers    w_l * ( ||mean - running mean|| + ||var - running var|| )
            + sum over conv layers  ||each of four statistics - its average over the real training set||

The second sum and the moving average of the batch statistics come from G-VBSM (arXiv 2311.17950).
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of 1d, 2d, 3d and synchronized BN

from ..errors import TeacherError
from .statistics import STATISTICS, channel_statistics, conv_statistics


def _is_matched(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def describe_norms(model: nn.Module) -> str:
    """Return how many normalization layers of each type BN alignment matches, and how many it does not."""
    named = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    layers = [m for m in named if _is_matched(m) or not list(m.children())]
    parts = []
    for matched in (True, False):
        kinds = Counter(type(m).__name__ for m in layers if _is_matched(m) == matched)
        parts.append(", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none")
    return f"norm layers in BN alignment: {parts[0]}; not in it: {parts[1]}"


def _as_map(x: Tensor) -> Tensor:
    """Return the input of a BN layer, (B, C) or (B, C, ...), as (B, C, H, W), with the same statistics per channel."""
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], -1, 1)


class Aligned(NamedTuple):
    """The result of one pass of a BN teacher: logits (B, K), or `None` if the head is skipped, and the alignment loss R."""

    logits: Tensor | None
    mismatch: Tensor


class _HeadNotNeeded(Exception):
    """Raised to end a forward pass after the last matched layer, because later layers cannot change R."""


@dataclass
class _Pass:
    """The state of a running forward pass."""

    kept: list[bool]  # for each convolution, whether this pass matches it
    last: int | None  # number of terms after which the pass ends; `None` runs the whole network
    terms: list[Tensor] = field(default_factory=list)
    averages: dict[str, Tensor] = field(default_factory=dict)
    norms: int = 0
    convolutions: int = 0


class Alignment:
    """The alignment loss R of a frozen network, computed by forward hooks that are active inside a `with` block.

    Args:
        model: A network in eval mode with at least one BatchNorm layer with running statistics.
        reduction: `sum` over layers, as published, or `mean` over BN layers and convolutions. The mean also counts dropped
            convolutions, so that dropping one does not raise the weight of the other layers.
        first_bn_multiplier: Weight w_l of the first BN layer in execution order; all other layers have weight 1.
        momentum: Weight of past batches in the moving average of the statistics, in [0, 1); 0 uses the batch alone.
        conv: The result of `gather_statistics` for this network and `patch`, or `None` to match BN layers only.
        drop: Probability that a pass drops a convolution; its moving averages then stay unchanged.
        generator: CPU generator for `drop`; each pass draws one number per convolution, regardless of the value of `drop`.

    Raises:
        TeacherError: The network has no layer to align. (In the published code, such a teacher dilutes the average.) Also
            raised by a pass if `conv` does not match the input.

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
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if not norms:
            folded = any(re.search("Rep|MobileOne", type(m).__name__) for m in model.modules())
            why = " (its BN layers were folded into convolutions for deployment; use the weights from training)"
            raise TeacherError(
                f"BN teacher {name!r} has no BatchNorm layer with running statistics{why if folded else ''}, so it has "
                "nothing to align; remove it from teachers.bn_pool, or use it as teachers.logit with include_logit: false"
            )
        assert generator is not None or not drop, "dropping convolutions requires a generator"
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
        self._terms: int | None = None  # number of terms in a full pass; set by the first pass
        self._pass: _Pass | None = None

    def __enter__(self) -> Self:
        self._handles = [layer.register_forward_pre_hook(self._record_term) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __call__(self, x: Tensor, *, head: bool = True) -> Aligned:
        """Run the network on x, (B, C, H, W), in its own normalization; without `head`, stop at the last matched layer."""
        assert self._handles, "Alignment must be used inside a `with` block"
        kept = [True] * len(self._targets)
        if self.generator is not None:
            kept = (torch.rand(len(kept), generator=self.generator) >= self.drop).tolist()
        # The first pass always runs the whole network: it counts the layers that are executed.
        self._pass = current = _Pass(kept, last=None if head else self._terms)
        logits: Tensor | None = None
        try:
            logits = self.model(x)
        except _HeadNotNeeded:
            pass
        finally:
            self._pass = None
        if current.convolutions != len(self._targets):
            raise self._misfit(f"expected {len(self._targets)} convolutions, {current.convolutions} ran")
        self._terms = len(current.terms)
        self._averages.update(current.averages)
        total = torch.stack(current.terms).sum()
        return Aligned(logits if head else None, total / len(current.terms) if self.reduction == "mean" else total)

    def state(self) -> dict[str, Tensor]:
        """Return all moving averages by name; empty before the first successful pass, and always empty with momentum 0."""
        return dict(self._averages)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the moving averages that `state` returned."""
        self._averages = {key: value.to(self._device, copy=True) for key, value in state.items()}

    def _record_term(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Compute the term of a layer from its input, just before the layer runs."""
        current = self._pass
        if current is None:
            return  # other code runs the network inside the block
        if isinstance(layer, _BatchNorm):
            batch = dict(zip(("mean", "var"), channel_statistics(_as_map(inputs[0])), strict=True))
            target: dict[str, Any] = {"mean": layer.running_mean, "var": layer.running_var}
            term = self._distance(current, f"bn.{current.norms}", batch, target)
            if current.norms == 0:
                term = term * self.first_bn_multiplier
            current.norms += 1
        else:
            number = current.convolutions
            current.convolutions += 1
            if number >= len(self._targets):
                raise self._misfit(f"expected {len(self._targets)} convolutions, more ran")
            term = torch.zeros((), device=self._device)
            if current.kept[number]:
                batch = conv_statistics(inputs[0], self.patch)
                term = self._distance(current, f"conv.{number}", batch, self._targets[number])
        current.terms.append(term)
        if len(current.terms) == current.last:
            raise _HeadNotNeeded

    def _distance(self, current: _Pass, layer: str, batch: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the L2 distances; at exactly zero, PyTorch uses the gradient zero, a valid subgradient."""
        norms = []
        for key, value in batch.items():
            if value.shape != target[key].shape:
                raise self._misfit(f"{layer}.{key} has {len(target[key])} values, but the input has {len(value)}")
            compared = self._smoothed(current, f"{layer}.{key}", value) if self.momentum else value
            norms.append((compared - target[key]).norm())
        return torch.stack(norms).sum()

    def _smoothed(self, current: _Pass, key: str, batch: Tensor) -> Tensor:
        """Return the updated moving average, with the gradient of this batch; it is stored only if the pass succeeds."""
        fixed, past = batch.detach(), self._averages.get(key)
        # differs: starts at the first batch. The published code intends this too, but a type check makes it start at zero.
        average = fixed if past is None else self.momentum * past + (1 - self.momentum) * fixed
        current.averages[key] = average
        return batch + (average - fixed)

    def _misfit(self, what: str) -> TeacherError:
        return TeacherError(
            f"teacher {self.name!r}: convolution statistics do not match the network ({what}); gather them again for "
            "this network, input size and patch"
        )
