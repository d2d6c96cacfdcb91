"""The objective: the loss of one step and its gradient, computed one teacher at a time.

Legend: B images of a job, C channels, H W pixels, K classes.

Source: PRISM (arXiv 2511.09905). A is one random view of the whole batch, p the logit teacher, S the set of BN teachers:

    L(x) = CE(f_p(A x), y)  +  bn_weight * (1 / |S|) * sum_{t in S} R(f_t, A x)  +  densification

SRe2L (arXiv 2306.13092) is the special case of an empty BN pool, S = {p}. In G-VBSM (arXiv 2311.17950), p changes at
each step, S = {p}, R includes convolution statistics and uses moving averages, and there is a densification term.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Literal, NamedTuple
from weakref import proxy

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import Teacher, with_bf16_weights
from ..recipe import SynthesisRecipe, TeachersRecipe
from ..runtime import Replayed
from .alignment import Alignment
from .densification import densification

Precision = Literal["float32", "bf16"]
Compile = Literal["auto", "on", "off"]
Outputs = tuple[Tensor | None, ...]
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
        compile: Compile = "auto",
    ) -> None:
        self._settings, self._teachers, self._precision = settings, teachers, precision
        conv, compiled, gathered = settings.conv, compile == "on", statistics or {}
        models = {name: t.model for name, t in teachers.items() if name in rule.synthesis_names}
        if precision == "bf16":
            models = {name: with_bf16_weights(model) for name, model in models.items()}
        self._alignments = {
            name: Alignment(
                models[name],
                reduction="mean" if settings.bn_reduction == "mean" else "sum",
                first_bn_multiplier=settings.first_bn_multiplier,
                momentum=settings.momentum,
                conv={key: value for key, value in gathered[name].items() if not key.startswith("norm.")} if conv else None,
                norms={key: value for key, value in gathered.get(name, {}).items() if key.startswith("norm.")},
                patch=conv.patch if conv else 1,
                drop=conv.drop if conv else 0.0,
                generator=generator,
                name=name,
                compiled=compiled,
            )
            for name in rule.bn_candidates
        }
        self._networks = {name: torch.compile(model) if compiled else model for name, model in models.items()}
        on_gpu = all(teachers[name].device.type == "cuda" for name in models)
        self._pool = torch.cuda.graph_pool_handle() if on_gpu and compile != "off" else None
        self._replayed: dict[tuple[str, bool, int], Replayed] = {}
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
            shared_by = len(bn_teachers) if name in bn_teachers else 0
            gradient, own_ce, mismatch = self._pass(name, name == logit, shared_by)(view, labels)
            assert gradient is not None
            view.grad = gradient if view.grad is None else view.grad + gradient
            if mismatch is not None:
                self.mismatches[name] = mismatch
                bn = bn + mismatch / len(bn_teachers)
            ce = ce if own_ce is None else own_ce
        assert view.grad is not None
        if (prior := self._settings.densification) is not None:
            dense = densification(view, labels, temperature=prior.temperature, size=prior.size)
            view.grad = view.grad + torch.autograd.grad(prior.weight * dense, view)[0]
            dense = dense.detach()
        return Terms(ce, bn, torch.linalg.vector_norm(view.grad, ord=torch.inf), dense)

    def _pass(self, name: str, head: bool, shared_by: int) -> Callable[[Tensor, Tensor], Outputs]:
        """Return `_gradient` for one teacher and these terms, on a GPU as a CUDA graph."""
        if self._pool is None or (shared_by and not self._alignments[name].repeats):
            return partial(self._gradient, name, head, shared_by)
        key = name, head, shared_by
        if key not in self._replayed:
            # Without a strong reference to itself, the objective and the memory of its graphs are freed after a job.
            plain = partial(Objective._gradient, proxy(self), *key)
            self._replayed[key] = Replayed(plain, self._pool, f"teacher {name}")
        return self._replayed[key]

    def _gradient(self, name: str, head: bool, shared_by: int, view: Tensor, labels: Tensor) -> Outputs:
        """Return the gradient of one teacher's terms at the view, the cross-entropy if `head` is set, and R of the teacher.

        `shared_by` is |S|, or 0 if the teacher is not in S.
        """
        teacher, leaf = self._teachers[name], view.detach().requires_grad_()
        x, loss, ce, mismatch = teacher.prepare(leaf), torch.zeros((), device=view.device), None, None
        half = torch.autocast(view.device.type, dtype=torch.bfloat16) if self._precision == "bf16" else nullcontext()
        with half:
            if shared_by:
                logits, mismatch = self._alignments[name](x, head=head)
            else:
                logits = self._networks[name](x)
        if mismatch is not None:
            mismatch = mismatch / self._scales[name]
            loss = loss + self._settings.bn_weight / shared_by * mismatch
        if logits is not None:
            ce = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
            loss = loss + ce
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient, None if ce is None else ce.detach(), None if mismatch is None else mismatch.detach()
