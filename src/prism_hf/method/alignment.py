"""BN alignment: the distance between the feature statistics of a batch and those of real data in a frozen network.

Legend: B images, C channels, H W pixels, K classes.

Source: PRISM (arXiv 2511.09905), BN alignment, introduced by DeepInversion (arXiv 1912.08795). The mean and the biased
variance are per channel, and || || is the L2 norm, not squared:

    R(f, x) = sum over BN layers    w_l * ( ||mean - running mean|| + ||var - running var|| )
            + sum over conv layers  ||each of four statistics - its average over the real training set||

The second sum and the moving average of the batch statistics come from G-VBSM (arXiv 2311.17950). In a network without
batch norm, the first sum is over its layer norms and group norms (ours): the statistics of their inputs over the batch and
all positions, against averages over the real training set.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of 1d, 2d, 3d and synchronized BN

from ..errors import TeacherError
from ..models import normalized_by, replaced
from .moments import Moments, Targets, channel_moments, conv_moments, counts_of, distance, frozen_norm, stacked
from .statistics import STATISTICS, channels_second, data_norms


def _matched_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _scale(layer: _BatchNorm) -> Tensor:
    """Return the factor of each channel in a BN layer in eval mode, (C,)."""
    assert layer.running_var is not None
    scale = (layer.running_var + layer.eps).rsqrt()
    return scale if layer.weight is None else scale * layer.weight.detach()


def describe_norms(model: nn.Module) -> str:
    """Return how many normalization layers of each type BN alignment matches, and how many it does not."""
    named = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    norms = {*_matched_norms(model), *data_norms(model)}
    layers = [m for m in named if m in norms or not list(m.children())]
    parts = []
    for matched in (True, False):
        kinds = Counter(type(m).__name__ for m in layers if (m in norms) == matched)
        parts.append(", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none")
    return f"norm layers in BN alignment: {parts[0]}; not in it: {parts[1]}"


class Aligned(NamedTuple):
    """The result of one pass of a BN teacher: logits (B, K), or `None` if the head is skipped, and the alignment loss R."""

    logits: Tensor | None
    mismatch: Tensor


class _HeadNotNeeded(Exception):
    """Raised to end a forward pass after the last matched layer, because later layers cannot change R."""


class _Seen(NamedTuple):
    """What a matched layer left in a pass: the layer if it is a norm, and its moments; none if it was dropped."""

    norm: nn.Module | None
    batch: tuple[Moments, ...]
    divisors: tuple[int, int] = (1, 1)  # those of a convolution's moments


class _Recorder:
    """Runs a network and collects what its matched layers leave, in execution order.

    Its layers must be `replaced` by `forwards`. `patch` is `None` if only BN layers are matched.
    """

    def __init__(self, model: nn.Module, patch: int | None) -> None:
        self._model, self._patch = model, patch
        norms = _matched_norms(model)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and patch is not None]
        self.forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {
            **{layer: normalized_by(layer, self._normalize) for layer in norms},
            **{layer: partial(self._pass_norm, layer) for layer in data_norms(model)},
            **{layer: partial(self._convolve, layer) for layer in convolutions},
        }
        self._scales = {layer: _scale(layer) for layer in norms}
        self._seen: list[_Seen] = []
        self._kept: Sequence[bool] = ()
        self._last: int | None = None
        self._convolutions = 0

    def __call__(self, x: Tensor, kept: Sequence[bool], last: int | None) -> tuple[Tensor | None, list[_Seen]]:
        """Run the network, up to layer number `last` if it is set, without matching the convolutions that are not kept."""
        self._seen, self._kept, self._last, self._convolutions = [], kept, last, 0
        try:
            return self._model(x), self._seen
        except _HeadNotNeeded:
            return None, self._seen

    def _normalize(self, layer: _BatchNorm, x: Tensor) -> Tensor:
        """Return the output of a BN layer, and match its input."""
        mean, var = layer.running_mean, layer.running_var
        assert mean is not None
        assert var is not None
        y, batch = frozen_norm(x, mean, var, layer.weight, layer.bias, layer.eps, scale=self._scales[layer])
        self._add(_Seen(layer, (batch,)))
        return y

    def _pass_norm(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Match the input of a layer norm or group norm, and return its output."""
        self._add(_Seen(layer, (channel_moments(channels_second(layer, x)),)))
        output: Tensor = type(layer).forward(layer, x)
        return output

    def _convolve(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        """Match the input of a convolution, and return its output."""
        assert self._patch is not None
        keep = self._convolutions >= len(self._kept) or self._kept[self._convolutions]
        self._convolutions += 1
        self._add(_Seen(None, conv_moments(x, self._patch) if keep else (), counts_of(x)))
        output: Tensor = type(layer).forward(layer, x)
        return output

    def _add(self, seen: _Seen) -> None:
        self._seen.append(seen)
        if len(self._seen) == self._last:
            raise _HeadNotNeeded


@lru_cache(maxsize=32)
def _compiled(model: nn.Module, patch: int | None) -> tuple[_Recorder, Callable[..., Any]]:
    """Return a recorder and its compiled form, the same for all jobs: compiling takes minutes."""
    # Every network counts as a recompilation of the same code; above the limit, PyTorch goes back to slow execution.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    recorder = _Recorder(model, patch)
    return recorder, torch.compile(recorder.__call__)


class _Term(NamedTuple):
    """Moments of a batch to compare with their targets."""

    name: str  # prefix of both statistics in a state
    batch: Moments
    target: tuple[Tensor, Tensor]
    weight: float
    kept: bool  # False for those of a convolution that this pass drops


class Alignment:
    """The alignment loss R of a frozen network.

    Args:
        model: A network in eval mode with at least one BatchNorm layer with running statistics, or with none, but with
            layer norms or group norms.
        reduction: `sum` over layers, as published, or `mean` over BN layers and convolutions. The mean also counts dropped
            convolutions, so that dropping one does not raise the weight of the other layers.
        first_bn_multiplier: Weight w_l of the first BN layer in execution order; all other layers have weight 1.
        momentum: Weight of past batches in the moving average of the statistics, in [0, 1); 0 uses the batch alone.
        conv: The result of `gather_statistics` for this network and `patch`, or `None` to match norms only.
        norms: The result of `gather_norms` for a network without BN. Without it, such a network can be made, but not run.
        drop: Probability that a pass drops a convolution; its moving averages then stay unchanged.
        generator: CPU generator for `drop`; each pass draws one number per convolution, regardless of the value of `drop`.
        compiled: Compile the passes with `torch.compile`, unless `drop` is used. The first pass then takes long.

    Raises:
        TeacherError: The network has no layer to align. (In the published code, such a teacher dilutes the average.) Also
            raised by a pass if `conv` does not match the input.

    Example:
        >>> align = Alignment(model)
        >>> logits, mismatch = align(images)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: Literal["sum", "mean"] = "sum",
        first_bn_multiplier: float = 10.0,
        momentum: float = 0.0,
        conv: Mapping[str, Tensor] | None = None,
        norms: Mapping[str, Tensor] | None = None,
        patch: int = 16,
        drop: float = 0.0,
        generator: torch.Generator | None = None,
        name: str = "network",
        compiled: bool = False,
    ) -> None:
        matched = [*_matched_norms(model), *data_norms(model)]
        if not matched:
            folded = any(re.search("Rep|MobileOne", type(m).__name__) for m in model.modules())
            why = " (its BN layers were folded into convolutions for deployment; use the weights from training)"
            raise TeacherError(
                f"BN teacher {name!r} has no BatchNorm layer with running statistics{why if folded else ''}, and no layer "
                "norm or group norm, so it has nothing to align; remove it from teachers.bn_pool, or use it as "
                "teachers.logit with include_logit: false"
            )
        assert generator is not None or not drop, "dropping convolutions requires a generator"
        self.model, self.reduction, self.first_bn_multiplier = model, reduction, first_bn_multiplier
        self.momentum, self.patch, self.drop, self.generator, self.name = momentum, patch, drop, generator, name
        self._device = next(value.device for value in (*model.parameters(), *model.buffers()))
        self._norms = {key: value.to(self._device) for key, value in (norms or {}).items()}
        conv = {key: value.to(self._device) for key, value in (conv or {}).items()}
        counted = range(len(conv) // len(STATISTICS))
        self._targets = [{key: conv[f"{number}.{key}"] for key in STATISTICS} for number in counted]
        self._recorder = _Recorder(model, patch if conv else None)
        self._record: Callable[..., tuple[Tensor | None, list[_Seen]]] = self._recorder
        self.compiled = compiled and not drop  # each choice of dropped layers would be compiled anew
        if self.compiled:
            self._recorder, self._record = _compiled(model, patch if conv else None)
        self._averages: dict[str, Tensor] = {}
        self._layers: int | None = None  # number of matched layers in a full pass; set by the first pass
        self._constants: Targets | None = None

    def __call__(self, x: Tensor, *, head: bool = True) -> Aligned:
        """Run the network on x, (B, C, H, W), in its own normalization; without `head`, stop at the last matched layer."""
        kept = [True] * len(self._targets)
        if self.generator is not None:
            kept = (torch.rand(len(kept), generator=self.generator) >= self.drop).tolist()
        # The first pass always runs the whole network: it counts the layers that are executed.
        with replaced(self._recorder.forwards):
            logits, seen = self._record(x, kept, None if head or self.compiled else self._layers)
        self._layers, terms = len(seen), self._terms(seen)
        batch = [term.batch for term in terms]
        if self._constants is None or not self._constants.fit(batch):
            self._constants = Targets.of(batch, [term.target for term in terms], [term.weight for term in terms])
        total = distance(batch, self._constants, self._smoothed(terms) if self.momentum else None)
        return Aligned(logits if head else None, total / len(seen) if self.reduction == "mean" else total)

    @property
    def repeats(self) -> bool:
        """Whether each pass does the same work and keeps no state, so that a GPU can replay it."""
        return not self.momentum and not self.drop

    def state(self) -> dict[str, Tensor]:
        """Return all moving averages by name; empty before the first successful pass, and always empty with momentum 0."""
        return {key: value.clone() for key, value in self._averages.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the moving averages that `state` returned."""
        self._averages = {key: value.to(self._device, copy=True) for key, value in state.items()}

    def _terms(self, seen: Sequence[_Seen]) -> list[_Term]:
        """Return the terms of R with their targets and weights."""
        terms, norms, convolutions = list[_Term](), 0, 0
        for norm, batches, divisors in seen:
            if norm is not None:
                weight, target = 1.0 if norms else self.first_bn_multiplier, self._target(norm, norms)
                terms.append(_Term(f"bn.{norms}.", batches[0], target, weight, True))
                norms += 1
                continue
            if convolutions >= len(self._targets):
                raise self._misfit(f"expected {len(self._targets)} convolutions, more ran")
            targets = self._targets[convolutions]
            # A dropped convolution is at a distance of zero.
            pairs = [(targets[f"{part}_mean"], targets[f"{part}_var"]) for part in ("channel", "patch")]
            kept, unchanged = bool(batches), [Moments(*p, n) for p, n in zip(pairs, divisors, strict=True)]
            for part, batch, pair in zip(("channel", "patch"), batches or unchanged, pairs, strict=True):
                if len(batch.mean) != len(pair[0]):
                    numbers = f"{len(pair[0])} values, but the input has {len(batch.mean)}"
                    raise self._misfit(f"conv.{convolutions}.{part}_mean has {numbers}")
                terms.append(_Term(f"conv.{convolutions}.{part}_", batch, pair, 1.0, kept))
            convolutions += 1
        if convolutions != len(self._targets):
            raise self._misfit(f"expected {len(self._targets)} convolutions, {convolutions} ran")
        return terms

    def _target(self, norm: nn.Module, number: int) -> tuple[Tensor, Tensor]:
        """Return mean and variance on real data of the norm that runs as this number, (C,) each."""
        if isinstance(norm, _BatchNorm):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            return norm.running_mean, norm.running_var
        if f"norm.{number}.mean" not in self._norms:
            raise self._misfit(f"norm {number} has no statistics of real images")
        return self._norms[f"norm.{number}.mean"], self._norms[f"norm.{number}.var"]

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
            f"teacher {self.name!r}: the statistics do not match the network ({what}); gather them again for this network, "
            "input size and patch"
        )
