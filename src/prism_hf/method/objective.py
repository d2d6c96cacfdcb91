"""What is optimised: the loss of one step, and its gradient, one teacher at a time.

Legend: B images of a job, C channels, H W pixels, K classes.

Source: PRISM (arXiv 2511.09905), with A one random view for the whole batch:

    L(x) = CE(f_p(A x), y)  +  bn_weight * (1 / |S|) * sum_{t in S} R(f_t, A x)  +  densification

SRe2L (arXiv 2306.13092) is the row with an empty BN pool: S = {p}. G-VBSM (arXiv 2311.17950) is the row with p another
teacher at each step, S = {p}, R with the statistics of convolutions in a moving average, and densification.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.teacher import Teacher
from ..recipe.sections import TeachersRecipe
from ..recipe.synthesis import Densification, SynthesisRecipe
from ..runtime.checkpoint import part, prefixed
from .alignment import BNAlignment
from .densification import densification
from .statistics import MovingAlignment

Precision = Literal["float32", "bf16"]
Reduction = Literal["sum", "mean", "balanced"]
Statistics = Mapping[str, Tensor]
"""What the convolutions of one teacher see on real data."""
_SMALLEST = 1e-12


class Terms(NamedTuple):
    """The terms of the loss, unweighted scalars: cross entropy, R averaged over the BN teachers, densification."""

    ce: Tensor
    bn: Tensor
    densification: Tensor | None = None


class Objective:
    """The objective of one job; the hooks of its BN teachers live inside a `with` block.

    Args:
        teachers: Logit teacher and BN pool by name.
        logit: Name of the logit teacher.
        bn_names: Every BN teacher that may be drawn.
        bn_weight: r_bn.
        reduction: `sum` or `mean` over layers, or `balanced`: the sum divided by that of the start images.
        first_bn_multiplier: Weight of each teacher's first BN layer.
        precision: Of the teachers' forward and backward passes; pixels, statistics and losses stay in float32.
        moving: Where statistics are smoothed or those of convolutions matched: one alignment per BN teacher, in place of
            the plain one.
        prior: Densification, or `None`.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        *,
        logit: str,
        bn_names: tuple[str, ...],
        bn_weight: float,
        reduction: Reduction = "sum",
        first_bn_multiplier: float = 10.0,
        precision: Precision = "float32",
        moving: Mapping[str, MovingAlignment] | None = None,
        prior: Densification | None = None,
    ) -> None:
        self._teachers, self._logit, self._bn_weight, self._precision = teachers, logit, bn_weight, precision
        self._moving, self._prior, self._balanced = moving or {}, prior, reduction == "balanced"
        layers: Literal["sum", "mean"] = "mean" if reduction == "mean" else "sum"
        self._alignments: Mapping[str, BNAlignment | MovingAlignment] = moving or {
            name: BNAlignment(teachers[name].model, reduction=layers, first_bn_multiplier=first_bn_multiplier, name=name)
            for name in bn_names
        }
        self._scales: dict[str, float] = dict.fromkeys(bn_names, 1.0)
        self._stack = ExitStack()

    @classmethod
    def of(
        cls,
        rule: TeachersRecipe,
        settings: SynthesisRecipe,
        teachers: Mapping[str, Teacher],
        precision: Precision,
        generator: torch.Generator,
        statistics: Mapping[str, Statistics] | None,
    ) -> Objective:
        """The objective that a recipe asks for; `generator` draws which layers are left out."""
        names, conv = rule.bn_candidates, settings.conv
        moving = None
        if conv is not None or settings.momentum:
            assert settings.bn_reduction != "balanced"
            moving = {
                name: MovingAlignment(
                    teachers[name].model,
                    momentum=settings.momentum,
                    conv=None if conv is None else (statistics or {})[name],
                    patch=conv.patch if conv else 1,
                    drop=conv.drop if conv else 0.0,
                    reduction=settings.bn_reduction,
                    first_bn_multiplier=settings.first_bn_multiplier,
                    name=name,
                    generator=generator,
                )
                for name in names
            }
        return cls(
            teachers,
            logit=rule.logit,
            bn_names=names,
            bn_weight=settings.bn_weight,
            reduction=settings.bn_reduction,
            first_bn_multiplier=settings.first_bn_multiplier,
            precision=precision,
            moving=moving,
            prior=settings.densification,
        )

    def __enter__(self) -> Objective:
        for alignment in self._alignments.values():
            self._stack.enter_context(alignment)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def begin(self, initial: Tensor, averages: Mapping[str, Tensor]) -> None:
        """Before the first step of a launch: what is measured at the start images, and the averages of an earlier launch.

        Args:
            initial: The start images, (B, C, H, W) in the reference normalisation.
            averages: From `state`; empty at the very start.
        """
        for name, moving in self._moving.items():
            if saved := part(name, averages):
                moving.restore(saved)
        if self._balanced:
            with torch.no_grad():
                for name, alignment in self._alignments.items():
                    found = float(alignment(self._teachers[name].prepare(initial), head=True).mismatch)
                    self._scales[name] = max(found, _SMALLEST)

    def state(self) -> dict[str, Tensor]:
        """Moving averages, for a checkpoint."""
        return {k: v for name, moving in self._moving.items() for k, v in prefixed(name, moving.state()).items()}

    def backward(self, view: Tensor, labels: Tensor, bn_teachers: tuple[str, ...], *, logit: str | None = None) -> Terms:
        """Add the gradient of L to `view.grad`, one teacher at a time: only one network's activations are alive.

        Args:
            view: A x, a leaf that requires a gradient, (B, C, H, W) in the reference normalisation.
            labels: y, (B,) int64.
            bn_teachers: S of this step. May be empty: then there is no BN term.
            logit: p of this step; by default that of the job.

        Returns:
            CE, the mean of R over S (zero if S is empty) and densification (`None` where it is off), detached.
        """
        logit = logit or self._logit
        total_bn = torch.zeros((), device=view.device)
        for name in dict.fromkeys((logit, *bn_teachers)):
            ce_of_this, mismatch = self._ask(name, view, labels, name == logit, name in bn_teachers)
            loss = torch.zeros((), device=view.device)
            if mismatch is not None:
                loss = loss + self._bn_weight / len(bn_teachers) * mismatch
                total_bn = total_bn + mismatch.detach() / len(bn_teachers)
            if ce_of_this is not None:
                ce = ce_of_this
                loss = loss + ce
            loss.backward()
        prior = None
        if self._prior is not None:
            prior = densification(view, labels, temperature=self._prior.temperature, size=self._prior.size)
            (self._prior.weight * prior).backward()
            prior = prior.detach()
        return Terms(ce.detach(), total_bn, prior)

    def _ask(
        self, name: str, view: Tensor, labels: Tensor, is_logit: bool, is_bn: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """CE and R of one teacher, where they are wanted."""
        teacher = self._teachers[name]
        x = teacher.prepare(view)
        mismatch = None
        with torch.autocast(view.device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16"):
            if is_bn:
                logits, mismatch = self._alignments[name](x, head=is_logit)
                if self._balanced:
                    mismatch = mismatch / self._scales[name]
            else:
                # A logit teacher is a BN teacher at every step or at none, so it carries no hooks here.
                logits = teacher.model(x)
        if not is_logit:
            return None, mismatch
        assert logits is not None
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels), mismatch
