"""The objective: the loss of one step, and its gradient, one teacher at a time.

Legend: B images of a job, C channels, H W pixels, K classes.

Source: PRISM (arXiv 2511.09905), with A one random view for the whole batch:

    L(x) = CE(f_p(A x), y)  +  bn_weight * (1 / |S|) * sum_{t in S} R(f_t, A x)  +  densification

SRe2L (arXiv 2306.13092) is the row with an empty BN pool: S = {p}. G-VBSM (arXiv 2311.17950) is the row with p another
teacher at each step, S = {p}, R with the statistics of convolutions in a moving average, and densification.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import Teacher
from ..recipe import SynthesisRecipe, TeachersRecipe
from .alignment import Alignment
from .densification import densification

Precision = Literal["float32", "bf16"]
_SMALLEST = 1e-12


class Terms(NamedTuple):
    """The terms of the loss of one step, unweighted: detached scalars on the device.

    CE at p, R averaged over S (0 if that is empty), the largest size of a pixel's gradient, densification if it is on.
    """

    ce: Tensor
    bn: Tensor
    grad: Tensor
    densification: Tensor | None = None


class Objective:
    """The objective of one job; the hooks of its BN teachers live inside a `with` block.

    `rule` names the teachers that may be drawn. `precision` is that of their passes: pixels, statistics and losses stay in
    float32. `generator` draws which convolutions are left out of a step. For the others see `synthesize`.
    """

    def __init__(
        self,
        rule: TeachersRecipe,
        settings: SynthesisRecipe,
        teachers: Mapping[str, Teacher],
        *,
        precision: Precision = "float32",
        generator: torch.Generator | None = None,
        statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._settings, self._teachers, self._precision = settings, teachers, precision
        conv = settings.conv
        self._alignments = {
            name: Alignment(
                teachers[name].model,
                reduction="mean" if settings.bn_reduction == "mean" else "sum",
                first_bn_multiplier=settings.first_bn_multiplier,
                momentum=settings.momentum,
                conv=(statistics or {})[name] if conv else None,
                patch=conv.patch if conv else 1,
                drop=conv.drop if conv else 0.0,
                generator=generator,
                name=name,
            )
            for name in rule.bn_candidates
        }
        self._scales = dict.fromkeys(rule.bn_candidates, 1.0)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for alignment in self._alignments.values():
            self._stack.enter_context(alignment)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @torch.no_grad()
    def balance(self, initial: Tensor) -> None:
        """Divide the R of each BN teacher by its value for the start images, (B, C, H, W), from now on."""
        for name, alignment in self._alignments.items():
            mismatch = float(alignment(self._teachers[name].prepare(initial)).mismatch)
            self._scales[name] = max(mismatch, _SMALLEST)

    def state(self) -> dict[str, Tensor]:
        """Moving averages as `averages/TEACHER/KEY`, to go on from."""
        averages = [(name, alignment.state()) for name, alignment in self._alignments.items()]
        return {f"averages/{name}/{key}": value for name, own in averages for key, value in own.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; other names are not read."""
        # Split at the last slash: names of teachers may hold some.
        entries = [(*key.rpartition("/")[::2], value) for key, value in state.items()]
        for name, alignment in self._alignments.items():
            alignment.restore({key: value for owner, key, value in entries if owner == f"averages/{name}"})

    def backward(self, view: Tensor, labels: Tensor, bn_teachers: tuple[str, ...], *, logit: str) -> Terms:
        """Add the gradient of L to `view.grad`, one teacher at a time: only one network's activations are alive.

        `view` is A x, a leaf that requires a gradient, (B, C, H, W) in the reference normalization; `labels` is y, (B,)
        int64; `logit` is p; `bn_teachers` is S, without any there is no BN term.
        """
        ce, bn, dense = torch.zeros((), device=view.device), torch.zeros((), device=view.device), None
        for name in dict.fromkeys((logit, *bn_teachers)):
            logits, mismatch = self._ask(name, view, head=name == logit, align=name in bn_teachers)
            loss = torch.zeros((), device=view.device)
            if mismatch is not None:
                loss = loss + self._settings.bn_weight / len(bn_teachers) * mismatch
                bn = bn + mismatch.detach() / len(bn_teachers)
            if logits is not None:
                own = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
                loss, ce = loss + own, own.detach()
            loss.backward()
        if (prior := self._settings.densification) is not None:
            dense = densification(view, labels, temperature=prior.temperature, size=prior.size)
            (prior.weight * dense).backward()
            dense = dense.detach()
        assert view.grad is not None
        return Terms(ce, bn, torch.linalg.vector_norm(view.grad, ord=torch.inf), dense)

    def _ask(self, name: str, view: Tensor, *, head: bool, align: bool) -> tuple[Tensor | None, Tensor | None]:
        """The logits of one teacher and its R, where they are wanted."""
        teacher = self._teachers[name]
        x = teacher.prepare(view)
        with torch.autocast(view.device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16"):
            if not align:
                return teacher.model(x), None
            logits, mismatch = self._alignments[name](x, head=head)
            return logits, mismatch / self._scales[name]
