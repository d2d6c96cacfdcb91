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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of 1d, 2d, 3d and synchronized BN

from ..errors import TeacherError
from ..models import normalized_by, replaced
from .moments import Moments, Targets, conv_moments, counts_of, distance, frozen_norm, stacked
from .statistics import STATISTICS


def _is_matched(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def _scale(layer: _BatchNorm) -> Tensor:
    """Return the factor of each channel in a BN layer in eval mode, (C,)."""
    assert layer.running_var is not None
    scale = (layer.running_var + layer.eps).rsqrt()
    return scale if layer.weight is None else scale * layer.weight.detach()


def describe_norms(model: nn.Module) -> str:
    """Return how many normalization layers of each type BN alignment matches, and how many it does not."""
    named = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    layers = [m for m in named if _is_matched(m) or not list(m.children())]
    parts = []
    for matched in (True, False):
        kinds = Counter(type(m).__name__ for m in layers if _is_matched(m) == matched)
        parts.append(", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none")
    return f"norm layers in BN alignment: {parts[0]}; not in it: {parts[1]}"


class Aligned(NamedTuple):
    """The result of one pass of a BN teacher: logits (B, K), or `None` if the head is skipped, and the alignment loss R."""

    logits: Tensor | None
    mismatch: Tensor


class _HeadNotNeeded(Exception):
    """Raised to end a forward pass after the last matched layer, because later layers cannot change R."""


class _Term(NamedTuple):
    """Moments of a batch to compare with their targets."""

    name: str  # prefix of both statistics in a state
    batch: Moments
    target: tuple[Tensor, Tensor]
    weight: float
    kept: bool  # False for those of a convolution that this pass drops


@dataclass
class _Pass:
    """The state of a running forward pass."""

    kept: list[bool]  # for each convolution, whether this pass matches it
    last: int | None  # number of layers after which the pass ends; `None` runs the whole network
    terms: list[_Term] = field(default_factory=list)
    norms: int = 0
    convolutions: int = 0

    @property
    def layers(self) -> int:
        return self.norms + self.convolutions


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
        compiled: Compile the passes with `torch.compile`, unless `drop` is used. The first pass then takes long.

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
        compiled: bool = False,
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
        self._forwards = {layer: normalized_by(layer, self._normalize) for layer in norms}
        self._scales = {layer: _scale(layer) for layer in norms}
        self._convolutions = [m for m in model.modules() if conv and isinstance(m, nn.Conv2d)]
        self.compiled = compiled and not drop  # each choice of dropped layers would be compiled anew
        if self.compiled:
            self._through = torch.compile(self._through)  # type: ignore[method-assign]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._averages: dict[str, Tensor] = {}
        self._layers: int | None = None  # number of matched layers in a full pass; set by the first pass
        self._constants: Targets | None = None
        self._pass: _Pass | None = None
        self._entered = False

    def __enter__(self) -> Self:
        self._handles = [layer.register_forward_pre_hook(self._match_convolution) for layer in self._convolutions]
        self._entered = True
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._entered = False

    def __call__(self, x: Tensor, *, head: bool = True) -> Aligned:
        """Run the network on x, (B, C, H, W), in its own normalization; without `head`, stop at the last matched layer."""
        assert self._entered, "Alignment must be used inside a `with` block"
        kept = [True] * len(self._targets)
        if self.generator is not None:
            kept = (torch.rand(len(kept), generator=self.generator) >= self.drop).tolist()
        # The first pass always runs the whole network: it counts the layers that are executed.
        last = None if head or self.compiled else self._layers
        try:
            with replaced(self._forwards):
                logits, current = self._through(x, kept, last)
        finally:
            self._pass = None
        if current.convolutions != len(self._targets):
            raise self._misfit(f"expected {len(self._targets)} convolutions, {current.convolutions} ran")
        self._layers = current.layers
        batch = [term.batch for term in current.terms]
        if self._constants is None or not self._constants.fit(batch):
            targets, weights = [term.target for term in current.terms], [term.weight for term in current.terms]
            self._constants = Targets.of(batch, targets, weights)
        total = distance(batch, self._constants, self._smoothed(current.terms) if self.momentum else None)
        return Aligned(logits if head else None, total / current.layers if self.reduction == "mean" else total)

    def _through(self, x: Tensor, kept: list[bool], last: int | None) -> tuple[Tensor | None, _Pass]:
        """Run the network; return its logits, and what its layers have left. This part may be compiled."""
        self._pass = current = _Pass(kept, last)
        try:
            return self.model(x), current
        except _HeadNotNeeded:
            return None, current

    def state(self) -> dict[str, Tensor]:
        """Return all moving averages by name; empty before the first successful pass, and always empty with momentum 0."""
        return {key: value.clone() for key, value in self._averages.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the moving averages that `state` returned."""
        self._averages = {key: value.to(self._device, copy=True) for key, value in state.items()}

    def _normalize(self, layer: _BatchNorm, x: Tensor) -> Tensor:
        """Return the output of a BN layer, and match its input."""
        current, mean, var = self._pass, layer.running_mean, layer.running_var
        assert current is not None
        assert mean is not None
        assert var is not None
        y, batch = frozen_norm(x, mean, var, layer.weight, layer.bias, layer.eps, scale=self._scales[layer])
        multiplier = 1.0 if current.norms else self.first_bn_multiplier
        current.terms.append(_Term(f"bn.{current.norms}.", batch, (mean, var), multiplier, True))
        current.norms += 1
        self._end_if_last(current)
        return y

    def _match_convolution(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Match the input of a convolution, just before the layer runs."""
        current = self._pass
        if current is None:
            return  # other code runs the network inside the block
        number = current.convolutions
        if number >= len(self._targets):
            raise self._misfit(f"expected {len(self._targets)} convolutions, more ran")
        target, kept = self._targets[number], current.kept[number]
        pairs = [(target[f"{part}_mean"], target[f"{part}_var"]) for part in ("channel", "patch")]
        # A dropped convolution is at a distance of zero.
        batches: Sequence[Moments] = [Moments(*pair, n) for pair, n in zip(pairs, counts_of(inputs[0]), strict=True)]
        if kept:
            batches = conv_moments(inputs[0], self.patch)
        for part, batch, pair in zip(("channel", "patch"), batches, pairs, strict=True):
            if len(batch.mean) != len(pair[0]):
                what = f"conv.{number}.{part}_mean has {len(pair[0])} values, but the input has {len(batch.mean)}"
                raise self._misfit(what)
            current.terms.append(_Term(f"conv.{number}.{part}_", batch, pair, 1.0, kept))
        current.convolutions += 1
        self._end_if_last(current)

    def _end_if_last(self, current: _Pass) -> None:
        if current.layers == current.last:
            raise _HeadNotNeeded

    def _smoothed(self, terms: Sequence[_Term]) -> Tensor:
        """Update the moving averages and return those of all terms, (2, N); a dropped term returns its own statistics.

        differs: an average starts at its first batch. The published code intends this too, but a type check makes it start
        at zero.
        """
        batch, sizes, past = stacked([term.batch for term in terms]), [len(term.batch.mean) for term in terms], []
        for part, row in zip(("mean", "var"), batch, strict=True):
            now = zip(terms, row.split(sizes), strict=True)
            past.append(torch.cat([self._averages.get(t.name + part, v) if t.kept else v for t, v in now]))
        average = torch.lerp(batch, torch.stack(past), self.momentum)
        for part, row in zip(("mean", "var"), average, strict=True):
            now = zip(terms, row.split(sizes), strict=True)
            self._averages.update({term.name + part: value for term, value in now if term.kept})
        return average

    def _misfit(self, what: str) -> TeacherError:
        return TeacherError(
            f"teacher {self.name!r}: convolution statistics do not match the network ({what}); gather them again for "
            "this network, input size and patch"
        )
