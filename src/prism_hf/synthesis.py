"""How pixels are optimised: the PRISM objective, and one job's loop.

Legend: B images of a job, C channels, H W pixels, K classes.

Source: PRISM (arXiv 2511.09905), with A one random view for the whole batch:

    L(x) = CE(f_p(A x), y)  +  bn_weight * (1 / |S|) * sum_{t in S} R_bn(f_t, A x)

SRe2L (arXiv 2306.13092) is the row with an empty BN pool: S = {p}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .alignment import BNAlignment, Reduction
from .checkpoint import Checkpoint, State, optimizer_state, part, prefixed, restore_optimizer
from .errors import NotFiniteError
from .memory import told_in_one_line
from .pixels import clamp_, to_reference, to_uint8
from .plan import SynthesisJob
from .recipe import SynthesisRecipe, SynthesisView
from .teachers import Teacher
from .views import draw_crop, resample

Precision = Literal["float32", "bf16"]

CHECK_EVERY = 10
"""Steps between looks at the losses; each look waits for the device, and finds the exact step that went wrong."""


class Terms(NamedTuple):
    """The two terms of the loss, unweighted scalars: cross entropy, and R_bn averaged over the BN teachers."""

    ce: Tensor
    bn: Tensor


class Objective:
    """The PRISM objective of one job; the hooks of its BN teachers live inside a `with` block.

    Args:
        teachers: Logit teacher and BN pool by name.
        logit: Name of the logit teacher.
        bn_names: Every BN teacher that may be drawn.
        bn_weight: r_bn.
        reduction: `sum` or `mean` over layers.
        first_bn_multiplier: Weight of each teacher's first BN layer.
        precision: Of the teachers' forward and backward passes; pixels, statistics and losses stay in float32.
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
    ) -> None:
        self._teachers, self._logit, self._bn_weight, self._precision = teachers, logit, bn_weight, precision
        self._alignments = {
            name: BNAlignment(teachers[name].model, reduction=reduction, first_bn_multiplier=first_bn_multiplier, name=name)
            for name in bn_names
        }
        self._stack = ExitStack()

    def __enter__(self) -> Objective:
        for alignment in self._alignments.values():
            self._stack.enter_context(alignment)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def backward(self, view: Tensor, labels: Tensor, bn_teachers: tuple[str, ...]) -> Terms:
        """Add the gradient of L to `view.grad`, one teacher at a time: only one network's activations are alive.

        Args:
            view: A x, a leaf that requires a gradient, (B, C, H, W) in the reference normalisation.
            labels: y, (B,) int64.
            bn_teachers: S of this step. May be empty: then there is no BN term.

        Returns:
            CE and the mean of R_bn over S (zero if S is empty), detached.
        """
        total_bn = torch.zeros((), device=view.device)
        share = self._bn_weight / max(len(bn_teachers), 1)
        for name in dict.fromkeys((self._logit, *bn_teachers)):
            teacher, is_logit = self._teachers[name], name == self._logit
            x = teacher.prepare(view)
            loss = torch.zeros((), device=view.device)
            with torch.autocast(view.device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16"):
                if name in bn_teachers:
                    logits, mismatch = self._alignments[name](x, head=is_logit)
                    loss = loss + share * mismatch
                    total_bn = total_bn + mismatch.detach() / len(bn_teachers)
                else:
                    # The logit teacher is a BN teacher at every step or at none, so it carries no hooks here.
                    logits = teacher.model(x)
            if is_logit:
                assert logits is not None
                ce = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
                loss = loss + ce
            loss.backward()
        return Terms(ce.detach(), total_bn)


@dataclass(frozen=True, eq=False)
class JobResult:
    """A finished job.

    Attributes:
        images_uint8: (B, C, H, W).
        history: One dict each `CHECK_EVERY` steps: `step`, `ce`, `bn`, `grad` (largest size of a pixel's gradient), `lr`,
            and `verifier_top1` where it was asked.
        logit_top1: Share of the final 8-bit images that the logit teacher puts in their class.
        verifier_top1: The same of the held-out verifier, or `None` without one.
        precision: Of the passes that made it.
    """

    images_uint8: Tensor
    history: list[dict[str, float]]
    logit_top1: float
    verifier_top1: float | None
    precision: Precision


class Progress:
    """A job between two steps: everything that the next step depends on.

    Args:
        job: Its seed and length.
        settings: The optimiser.
        initial: (B, C, H, W) in the reference normalisation; not changed.
    """

    def __init__(self, job: SynthesisJob, settings: SynthesisRecipe, initial: Tensor) -> None:
        self.images = initial.detach().clone().contiguous(memory_format=torch.channels_last).requires_grad_()
        self.optimizer = torch.optim.Adam([self.images], lr=settings.lr, betas=settings.betas)
        self.generator = torch.Generator().manual_seed(job.seed)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.losses: list[Tensor] = []

    def state(self) -> State:
        """For a checkpoint."""
        optimizer = optimizer_state(self.optimizer)
        losses = torch.stack(self.losses) if self.losses else torch.empty(0, 3)
        tensors = {"images": self.images, "generator": self.generator.get_state(), "losses": losses}
        notes = {"step": self.step, "history": self.history, "optimizer": optimizer.notes}
        return State(tensors | prefixed("optimizer", optimizer.tensors), notes)

    def restore(self, state: State) -> None:
        """Go on from what `state` gave."""
        self.images.data.copy_(state.tensors["images"])
        self.generator.set_state(state.tensors["generator"])
        self.losses = list(state.tensors["losses"].to(self.images.device))
        self.step, self.history = state.notes["step"], list(state.notes["history"])
        restore_optimizer(self.optimizer, State(part("optimizer", state.tensors), state.notes["optimizer"]))


def synthesize(
    job: SynthesisJob,
    settings: SynthesisRecipe,
    initial: Tensor,
    teachers: Mapping[str, Teacher],
    *,
    verifier: Teacher | None = None,
    on_check: Callable[[dict[str, float]], None] | None = None,
    checkpoint: Checkpoint | None = None,
    precision: Precision = "float32",
) -> JobResult:
    """Optimise the images of one job.

    Args:
        job: Who teaches, for how long, with which seed.
        settings: The objective and the optimiser.
        initial: (B, C, H, W) in the reference normalisation, on the device to compute on; not changed.
        teachers: Logit teacher and BN pool by name, on that device.
        verifier: Asked each `verify_every` steps and at the end; never in the loss.
        on_check: Called with each new entry of the history.
        checkpoint: Where the job's state is kept now and then, and where it goes on if there is one.
        precision: `bf16` runs the teachers under autocast.

    Raises:
        NotFiniteError: A loss, gradient or pixel is NaN or infinite (names job and step; its state is in the checkpoint).
        DeviceMemoryError: The batch does not fit.
        StoppedError: Somebody asked the program to stop.

    Example:
        >>> result = synthesize(job, recipe.synthesis, initial, teachers)
        >>> result.images_uint8.dtype
        torch.uint8
    """
    labels = torch.tensor(job.classes, device=initial.device)
    now = Progress(job, settings, initial)
    if checkpoint is not None and (saved := checkpoint.load()) is not None:
        now.restore(saved)
    with _enough_memory(job):
        with _objective(job, settings, teachers, precision) as objective:
            while now.step < job.iterations:
                lr = _one_step(now, job, settings, objective, labels)
                if now.step % CHECK_EVERY == 0 or now.step == job.iterations:
                    now.history.append(_look(now, job, settings, lr, verifier, labels, checkpoint))
                    if on_check is not None:
                        on_check(now.history[-1])
                if checkpoint is not None:
                    checkpoint.tick(now.state)
        final = to_uint8(now.images.detach())
        logit_top1 = _top1(teachers[job.teachers.logit], final, labels)
        verifier_top1 = None if verifier is None else _top1(verifier, final, labels)
    return JobResult(final.cpu().contiguous(), now.history, logit_top1, verifier_top1, precision)


def _one_step(now: Progress, job: SynthesisJob, settings: SynthesisRecipe, objective: Objective, labels: Tensor) -> float:
    """One Adam step on the pixels; the learning rate that it used."""
    lr = _set_lr(now.optimizer, settings, now.step, job.iterations)
    view = draw_view(now.images, settings.view, now.generator)
    leaf = view.detach().requires_grad_()
    terms = objective.backward(leaf, labels, job.bn_teachers(now.step))
    assert leaf.grad is not None
    now.optimizer.zero_grad(set_to_none=True)
    view.backward(leaf.grad)
    now.optimizer.step()
    if settings.clamp:
        clamp_(now.images.data)
    now.losses.append(torch.stack((*terms, torch.linalg.vector_norm(leaf.grad, ord=torch.inf))))
    now.step += 1
    return lr


def _look(
    now: Progress,
    job: SynthesisJob,
    settings: SynthesisRecipe,
    lr: float,
    verifier: Teacher | None,
    labels: Tensor,
    checkpoint: Checkpoint | None,
) -> dict[str, float]:
    """A new entry of the history, after a look at the last steps: the one place that waits for the device."""
    try:
        entry = _check(now, job) | {"lr": lr}
    except NotFiniteError:
        if checkpoint is not None:
            checkpoint.save(now.state())
        raise
    now.losses = []
    last_look = int(now.history[-1]["step"]) if now.history else 0
    due = now.step // settings.verify_every > last_look // settings.verify_every
    if verifier is not None and (due or now.step == job.iterations):
        entry["verifier_top1"] = _top1(verifier, to_uint8(now.images.detach()), labels)
    return entry


def draw_view(images: Tensor, view: SynthesisView, generator: torch.Generator) -> Tensor:
    """A x: one crop, flip and roll for the whole batch, drawn on the CPU: the same on any device."""
    crop = draw_crop(1, images.shape[-1], view.crop_scale, generator)
    uniform = torch.rand(3, generator=generator)
    flip = (uniform[:1] < 0.5) & view.flip
    roll = (uniform[1:] * (view.jitter + 1)).long().clamp(max=view.jitter).tolist()
    return resample(images, crop, flip, roll=(roll[0], roll[1]))


def _objective(
    job: SynthesisJob, settings: SynthesisRecipe, teachers: Mapping[str, Teacher], precision: Precision
) -> Objective:
    return Objective(
        teachers,
        logit=job.teachers.logit,
        bn_names=job.teachers.bn_candidates,
        bn_weight=settings.bn_weight,
        reduction=settings.bn_reduction,
        first_bn_multiplier=settings.first_bn_multiplier,
        precision=precision,
    )


def _enough_memory(job: SynthesisJob) -> AbstractContextManager[None]:
    return told_in_one_line(
        f"job {job.id}: a batch of {len(job.classes)} images and teachers {', '.join(job.teachers.synthesis_names)}",
        "The batch is part of the method and is not shrunk: lower synthesis.batch_size in the recipe, or use a device with "
        "more memory",
    )


def _set_lr(optimizer: torch.optim.Optimizer, settings: SynthesisRecipe, step: int, steps: int) -> float:
    factor = 1.0
    if settings.lr_schedule == "cosine":
        factor = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps, dtype=torch.float64))))
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * factor
    return settings.lr * factor


def _check(now: Progress, job: SynthesisJob) -> dict[str, float]:
    values = torch.stack(now.losses).cpu().double()
    bad = (~values.isfinite()).any(1).nonzero().flatten().tolist()
    advice = "Lower synthesis.lr or synthesis.bn_weight, or keep synthesis.clamp on"
    if bad:
        step = now.step - len(now.losses) + bad[0] + 1
        ce, bn, grad = values[bad[0]].tolist()
        raise NotFiniteError(
            f"job {job.id}, iteration {step}: not finite (ce {ce:g}, bn {bn:g}, largest gradient {grad:g}). {advice}"
        )
    if not bool(now.images.isfinite().all()):
        raise NotFiniteError(f"job {job.id}, iteration {now.step}: a pixel is not finite. {advice}")
    ce, bn, grad = values[-1].tolist()
    return {"step": now.step, "ce": ce, "bn": bn, "grad": grad}


@torch.no_grad()
def _top1(teacher: Teacher, images_uint8: Tensor, labels: Tensor) -> float:
    return float((teacher.logits(to_reference(images_uint8)).argmax(1) == labels).float().mean())
