"""How pixels are optimised: one job's loop.

Legend: B images of a job, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotFiniteError
from ..images.pixels import clamp_, to_reference, to_uint8
from ..images.views import draw_crop, resample
from ..models.teacher import Teacher
from ..recipe.plan import SynthesisJob
from ..recipe.synthesis import SynthesisRecipe, SynthesisView
from ..runtime.checkpoint import Checkpoint, State, optimizer_state, part, prefixed, restore_optimizer
from ..runtime.memory import told_in_one_line
from .objective import Objective, Precision, Statistics

CHECK_EVERY = 10
"""Steps between looks at the losses; each look waits for the device, and finds the exact step that went wrong."""


@dataclass(frozen=True, eq=False)
class JobResult:
    """A finished job.

    Attributes:
        images_uint8: (B, C, H, W).
        history: One dict each `CHECK_EVERY` steps: `step`, `ce`, `bn`, `grad` (largest size of a pixel's gradient), `lr`,
            `densification` where it is on, and `verifier_top1` where it was asked.
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
        self.averages: dict[str, Tensor] = {}

    def state(self, objective: Objective | None = None) -> State:
        """For a checkpoint; with the moving averages of the objective, where it has any."""
        optimizer = optimizer_state(self.optimizer)
        losses = torch.stack(self.losses) if self.losses else torch.empty(0, 3)
        tensors = {"images": self.images, "generator": self.generator.get_state(), "losses": losses}
        tensors |= prefixed("averages", objective.state() if objective is not None else {})
        notes = {"step": self.step, "history": self.history, "optimizer": optimizer.notes}
        return State(tensors | prefixed("optimizer", optimizer.tensors), notes)

    def restore(self, state: State) -> None:
        """Go on from what `state` gave."""
        self.images.data.copy_(state.tensors["images"])
        self.generator.set_state(state.tensors["generator"])
        self.losses = list(state.tensors["losses"].to(self.images.device))
        self.averages = part("averages", state.tensors)
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
    statistics: Mapping[str, Statistics] | None = None,
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
        statistics: What each teacher's convolutions see on real data, from `gather_statistics`; for `settings.conv`.

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
        with Objective.of(job.teachers, settings, teachers, precision, now.generator, statistics) as objective:
            objective.begin(initial, now.averages)
            while now.step < job.iterations:
                lr = _one_step(now, job, settings, objective, labels)
                if now.step % CHECK_EVERY == 0 or now.step == job.iterations:
                    now.history.append(_look(now, job, settings, lr, verifier, labels, checkpoint, objective))
                    if on_check is not None:
                        on_check(now.history[-1])
                if checkpoint is not None:
                    checkpoint.tick(lambda: now.state(objective))
        final = to_uint8(now.images.detach())
        logit_top1 = _top1(teachers[job.teachers.logit], final, labels)
        verifier_top1 = None if verifier is None else _top1(verifier, final, labels)
    return JobResult(final.cpu().contiguous(), now.history, logit_top1, verifier_top1, precision)


def _one_step(now: Progress, job: SynthesisJob, settings: SynthesisRecipe, objective: Objective, labels: Tensor) -> float:
    """One Adam step on the pixels; the learning rate that it used."""
    lr = _set_lr(now.optimizer, settings, now.step, job.iterations)
    view = draw_view(now.images, settings.view, now.generator, progress=now.step / max(job.iterations - 1, 1))
    leaf = view.detach().requires_grad_()
    terms = objective.backward(leaf, labels, job.bn_teachers(now.step), logit=job.logit_teacher(now.step))
    assert leaf.grad is not None
    now.optimizer.zero_grad(set_to_none=True)
    view.backward(leaf.grad)
    now.optimizer.step()
    if settings.clamp:
        clamp_(now.images.data)
    extra = () if terms.densification is None else (terms.densification,)
    now.losses.append(torch.stack((terms.ce, terms.bn, torch.linalg.vector_norm(leaf.grad, ord=torch.inf), *extra)))
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
    objective: Objective,
) -> dict[str, float]:
    """A new entry of the history, after a look at the last steps: the one place that waits for the device."""
    try:
        entry = _check(now, job) | {"lr": lr}
    except NotFiniteError:
        if checkpoint is not None:
            checkpoint.save(now.state(objective))
        raise
    now.losses = []
    last_look = int(now.history[-1]["step"]) if now.history else 0
    due = now.step // settings.verify_every > last_look // settings.verify_every
    if verifier is not None and (due or now.step == job.iterations):
        entry["verifier_top1"] = _top1(verifier, to_uint8(now.images.detach()), labels)
    return entry


def draw_view(images: Tensor, view: SynthesisView, generator: torch.Generator, *, progress: float = 1.0) -> Tensor:
    """A x: one crop, flip and roll for the whole batch, drawn on the CPU: the same on any device.

    Args:
        images: x, (B, C, H, W) float.
        view: What may be drawn.
        generator: Where all randomness comes from.
        progress: Share of the iterations that are done, in [0, 1]; for the curriculum.
    """
    crop = draw_crop(1, images.shape[-1], crop_range(view, progress), generator)
    uniform = torch.rand(3, generator=generator)
    flip = (uniform[:1] < 0.5) & view.flip
    roll = (uniform[1:] * (view.jitter + 1)).long().clamp(max=view.jitter).tolist()
    return resample(images, crop, flip, roll=(roll[0], roll[1]))


def crop_range(view: SynthesisView, progress: float) -> tuple[float, float]:
    """Smallest and largest share of the area of a crop, after this share of the iterations.

    Source: CDA (arXiv 2311.18838): global views first, local ones later; the lower end falls along half a cosine.
    """
    low, high = view.crop_scale
    if view.curriculum == "cosine":
        low = high + (low - high) * 0.5 * (1 - math.cos(math.pi * progress))
    return low, high


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
        ce, bn, grad, *_ = values[bad[0]].tolist()
        raise NotFiniteError(
            f"job {job.id}, iteration {step}: not finite (ce {ce:g}, bn {bn:g}, largest gradient {grad:g}). {advice}"
        )
    if not bool(now.images.isfinite().all()):
        raise NotFiniteError(f"job {job.id}, iteration {now.step}: a pixel is not finite. {advice}")
    ce, bn, grad, *extra = values[-1].tolist()
    return {"step": now.step, "ce": ce, "bn": bn, "grad": grad} | dict(zip(("densification",), extra, strict=False))


@torch.no_grad()
def _top1(teacher: Teacher, images_uint8: Tensor, labels: Tensor) -> float:
    return float((teacher.logits(to_reference(images_uint8)).argmax(1) == labels).float().mean())
