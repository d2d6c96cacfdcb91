"""The objective: the loss of one step and its gradient, computed one teacher at a time.

Legend: B images of a job, C channels, H W pixels, K classes.

Source: PRISM (arXiv 2511.09905). A is one random view of the whole batch, p the logit teacher, S the set of BN teachers:

    L(x) = CE(f_p(A x), y)  +  bn_weight * (1 / |S|) * sum_{t in S} R(f_t, A x)  +  densification

SRe2L (arXiv 2306.13092) is the special case of an empty BN pool, S = {p}. In G-VBSM (arXiv 2311.17950), p changes at
each step, S = {p}, R includes convolution statistics and uses moving averages, and there is a densification term.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Literal, NamedTuple

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
    """The unweighted terms of the loss of one step, as detached scalars on the device.

    Cross-entropy of p, mean of R over S (0 if S is empty), largest absolute pixel gradient, and densification if enabled.
    """

    ce: Tensor
    bn: Tensor
    grad: Tensor
    densification: Tensor | None = None


class Objective:
    """The objective of one synthesis job.

    `rule` names the teachers that may be drawn. `precision` applies to their passes; pixels, statistics and losses stay in
    float32. `generator` draws which convolutions a step drops. For the other arguments, see `synthesize`.
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
        compiled: bool = False,
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
                compiled=compiled,
            )
            for name in rule.bn_candidates
        }
        self._networks = {name: torch.compile(t.model) if compiled else t.model for name, t in teachers.items()}
        self._scales = dict.fromkeys(rule.bn_candidates, 1.0)
        self.mismatches: dict[str, Tensor] = {}

    @torch.no_grad()
    def balance(self, initial: Tensor) -> None:
        """Normalize the R of each BN teacher: later values are divided by its value on the start images, (B, C, H, W)."""
        for name, alignment in self._alignments.items():
            mismatch = float(alignment(self._teachers[name].prepare(initial)).mismatch)
            self._scales[name] = max(mismatch, _SMALLEST)

    def state(self) -> dict[str, Tensor]:
        """Return the moving averages as `averages/TEACHER/KEY`, for `restore`."""
        averages = [(name, alignment.state()) for name, alignment in self._alignments.items()]
        return {f"averages/{name}/{key}": value for name, entries in averages for key, value in entries.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the moving averages that `state` returned; other keys are ignored."""
        # Split at the last slash, because teacher names may contain slashes.
        entries = [(*key.rpartition("/")[::2], value) for key, value in state.items()]
        for name, alignment in self._alignments.items():
            alignment.restore({key: value for owner, key, value in entries if owner == f"averages/{name}"})

    def backward(self, view: Tensor, labels: Tensor, bn_teachers: tuple[str, ...], *, logit: str) -> Terms:
        """Add the gradient of L to `view.grad`, one teacher at a time: memory holds the activations of only one network.

        `view` is A x, a leaf tensor that requires a gradient, (B, C, H, W) in the reference normalization. `labels` is y,
        (B,) int64. `logit` is p. `bn_teachers` is S; if it is empty, there is no BN term. `mismatches` then has R of each.
        """
        self.mismatches = {}
        ce, bn, dense = torch.zeros((), device=view.device), torch.zeros((), device=view.device), None
        for name in dict.fromkeys((logit, *bn_teachers)):
            logits, mismatch = self._run(name, view, head=name == logit, align=name in bn_teachers)
            loss = torch.zeros((), device=view.device)
            if mismatch is not None:
                loss = loss + self._settings.bn_weight / len(bn_teachers) * mismatch
                self.mismatches[name] = mismatch.detach()
                bn = bn + mismatch.detach() / len(bn_teachers)
            if logits is not None:
                ce = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
                loss, ce = loss + ce, ce.detach()
            loss.backward()
        if (prior := self._settings.densification) is not None:
            dense = densification(view, labels, temperature=prior.temperature, size=prior.size)
            (prior.weight * dense).backward()
            dense = dense.detach()
        assert view.grad is not None
        return Terms(ce, bn, torch.linalg.vector_norm(view.grad, ord=torch.inf), dense)

    def _run(self, name: str, view: Tensor, *, head: bool, align: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return the logits of one teacher if `head` is set, and its R if `align` is set; otherwise `None`."""
        teacher = self._teachers[name]
        x = teacher.prepare(view)
        half = torch.autocast(view.device.type, dtype=torch.bfloat16) if self._precision == "bf16" else nullcontext()
        with half:
            if not align:
                return self._networks[name](x), None
            logits, mismatch = self._alignments[name](x, head=head)
            return logits, mismatch / self._scales[name]
