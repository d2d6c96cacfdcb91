"""One synthesis job: the steps of the method, with loss checks, a history, verifier scores and checkpoints."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import NotFiniteError
from ..images import to_reference, to_uint8
from ..method import Compile, Precision, Step, synthesize
from ..models import Teacher
from ..recipe import SynthesisJob, SynthesisRecipe
from ..runtime import Checkpoint, State, told_in_one_line

CHECK_EVERY = 10
"""Steps between checks of the losses. A check waits for the device, and identifies the exact step that failed."""
BALANCED = (1 / 30, 30.0)
"""Range of the weighted BN term, divided by the classification loss, in which both have a say."""
_RATIO = "ratio "
_NO_MEMORY = (
    "The batch size is part of the method and is never reduced automatically: lower synthesis.batch_size in the recipe, "
    "or use a device with more memory"
)
History = list[dict[str, float]]


@dataclass(frozen=True, eq=False)
class JobResult:
    """The result of a finished job.

    The history has one dict per `CHECK_EVERY` steps: `step`, `ce`, `bn`, `grad` (largest absolute gradient of a pixel),
    `lr`, `densification` if it is on, and `verifier_top1` at the steps where the verifier scored the images. The first
    entry also has `ratio NAME` for each BN teacher; see `ratios_in`.
    """

    images_uint8: Tensor  # (B, C, H, W)
    history: History
    logit_top1: float  # share of the final 8-bit images that the logit teacher classifies correctly
    verifier_top1: float | None  # the same for the held-out verifier; `None` without one


def optimize(
    job: SynthesisJob,
    settings: SynthesisRecipe,
    initial: Tensor,
    teachers: Mapping[str, Teacher],
    *,
    verifier: Teacher | None = None,
    on_check: Callable[[dict[str, float]], None] = lambda _: None,
    checkpoint: Checkpoint | None = None,
    precision: Precision = "float32",
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    compile: Compile = "auto",
) -> JobResult:
    """Run all steps of one job, starting from its checkpoint if there is one; see `synthesize`.

    `verifier` scores the images every `verify_every` steps and at the end, and is never in the loss. `on_check` is called
    with each new entry of the history.

    Raises:
        NotFiniteError: A loss, gradient or pixel is NaN or infinite (names job and step; the checkpoint has the state).
        DeviceMemoryError: The batch does not fit in memory.
        StoppedError: The program was asked to stop.
    """
    saved = None if checkpoint is None else checkpoint.load()
    state = None if saved is None else saved.tensors
    pixels = initial if state is None else state["pixels"].to(initial.device)
    losses = [] if state is None else list(state["losses"].to(initial.device))
    history: History = [] if saved is None else list(saved.notes["history"])
    begin = partial(synthesize, job, settings, initial, teachers, precision=precision, compile=compile)
    steps = begin(statistics=statistics, state=state)
    batch = f"a batch of {len(job.classes)} images and teachers {', '.join(job.teachers.synthesis_names)}"
    with told_in_one_line(f"job {job.id}: {batch}", _NO_MEMORY), closing(steps):
        for step in steps:
            pixels = step.pixels
            losses.append(torch.stack([term for term in step.terms if term is not None]))
            if step.number % CHECK_EVERY == 0 or step.number == job.iterations:
                try:
                    entry = _check(job, settings, step, losses, verifier)
                    history.append(entry if history else entry | _ratios(job, settings, step, losses))
                except NotFiniteError:
                    if checkpoint is not None:
                        checkpoint.save(_state(step, losses, history))
                    raise
                losses = []
                on_check(history[-1])
            if checkpoint is not None:
                checkpoint.tick(partial(_state, step, losses, history))
        return _result(job, pixels, history, teachers[job.teachers.logit], verifier)


def _result(
    job: SynthesisJob, pixels: Tensor, history: History, logit_teacher: Teacher, verifier: Teacher | None
) -> JobResult:
    # Same memory format as in the steps: a teacher may round differently in another one.
    images_uint8 = to_uint8(pixels.contiguous(memory_format=torch.channels_last))
    logit_top1 = _top1(logit_teacher, images_uint8, job)
    verifier_top1 = None if verifier is None else _top1(verifier, images_uint8, job)
    return JobResult(images_uint8.cpu().contiguous(), history, logit_top1, verifier_top1)


def _check(
    job: SynthesisJob, settings: SynthesisRecipe, step: Step, losses: Sequence[Tensor], verifier: Teacher | None
) -> dict[str, float]:
    """Return a history entry. `losses` has a row (ce, bn, grad, densification if on) per step since the last entry."""
    values = torch.stack(list(losses)).cpu().double()
    bad = (~values.isfinite()).any(1).nonzero().flatten().tolist()
    advice = "Lower synthesis.lr or synthesis.bn_weight, or keep synthesis.clamp on"
    if bad:
        number = step.number - len(losses) + bad[0] + 1
        ce, bn, grad, *_ = values[bad[0]].tolist()
        raise NotFiniteError(
            f"job {job.id}, iteration {number}: not finite (ce {ce:g}, bn {bn:g}, largest gradient {grad:g}). {advice}"
        )
    if not bool(step.pixels.isfinite().all()):
        raise NotFiniteError(f"job {job.id}, iteration {step.number}: a pixel is not finite. {advice}")
    terms = dict(zip(("ce", "bn", "grad", "densification"), values[-1].tolist(), strict=False))
    entry = {"step": step.number, **terms, "lr": step.lr}
    last_check = (step.number - 1) // CHECK_EVERY * CHECK_EVERY
    due = step.number // settings.verify_every > last_check // settings.verify_every
    if verifier is not None and (due or step.number == job.iterations):
        entry["verifier_top1"] = _top1(verifier, to_uint8(step.pixels), job)
    return entry


def _ratios(job: SynthesisJob, settings: SynthesisRecipe, step: Step, losses: Sequence[Tensor]) -> dict[str, float]:
    """Return the weighted BN term of each teacher so far, as if it were alone, divided by the classification loss.

    A step with one BN teacher, as in selection `cycle`, has its term in `losses`; the last step has that of every teacher.
    """
    rows = torch.stack(list(losses)).cpu().double().tolist()
    terms: dict[str, tuple[float, float]] = {}
    for iteration, (ce, bn, *_) in enumerate(rows, step.number - len(rows)):
        names = job.bn_teachers(iteration)
        terms |= {name: (bn, ce) for name in names if len(names) == 1}
    terms |= {name: (float(value), rows[-1][0]) for name, value in step.mismatches.items()}
    ratios = {name: settings.bn_weight * bn / max(ce, 1e-12) for name, (bn, ce) in terms.items()}
    return {f"{_RATIO}{name}": ratio for name, ratio in ratios.items() if math.isfinite(ratio)}


def ratios_in(entry: Mapping[str, float]) -> dict[str, float]:
    """Return the weighted BN term of each teacher, divided by the classification loss, if a history entry has them."""
    return {key.removeprefix(_RATIO): value for key, value in entry.items() if key.startswith(_RATIO)}


def history_tensors(history: History) -> dict[str, Tensor]:
    """Return a history as one tensor per value, (n,) float64, NaN where an entry has none; without the ratios."""
    names = dict.fromkeys(name for entry in history for name in entry if not name.startswith(_RATIO))
    columns = {name: [entry.get(name, math.nan) for entry in history] for name in names}
    return {f"history/{name}": torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


def term_ratios(notes: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median ratio of each BN teacher over the notes of finished jobs; see `ratios_in`."""
    found: dict[str, list[float]] = defaultdict(list)
    for note in notes:
        for name, value in note.get("ratios", {}).items():  # jobs of earlier versions have none
            found[name].append(value)
    return {name: statistics.median(values) for name, values in sorted(found.items())}


def ratio_lines(ratios: Mapping[str, float], bn_weight: float) -> list[str]:
    """Return a line with the ratios, and a line of advice for each that lies outside of `BALANCED`."""
    if not ratios:
        return []
    parts = ", ".join(f"{name} {value:.3g}" for name, value in ratios.items())
    lines = [f"weighted BN term / classification loss at the first look: {parts}"]
    for name, value in ratios.items():
        if value and not BALANCED[0] <= value <= BALANCED[1]:
            lines.append(
                f"warning: one term rules for {name}; with synthesis.bn_weight={bn_weight / value:.2g} both would be equal "
                f"(expected ratios from {BALANCED[0]:.2g} to {BALANCED[1]:g})"
            )
    return lines


@torch.no_grad()
def _top1(teacher: Teacher, images_uint8: Tensor, job: SynthesisJob) -> float:
    """Return the share of a job's images that a teacher classifies correctly."""
    labels = torch.tensor(job.classes, device=images_uint8.device)
    return float((teacher.logits(to_reference(images_uint8)).argmax(1) == labels).float().mean())


def _state(step: Step, losses: Sequence[Tensor], history: History) -> State:
    pending = torch.stack(list(losses)) if losses else torch.empty(0, 3)
    return State(step.state() | {"losses": pending}, {"step": step.number, "history": history})
