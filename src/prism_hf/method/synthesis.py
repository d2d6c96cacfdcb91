"""Synthesis: optimize the pixels of one job, step by step.

Legend: B images of a job, C channels, H W pixels.

Each step draws one random view A of the whole batch and takes one Adam step along the gradient of L(x) at the pixels.
"""

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..images import clamp_, draw_crop, resample
from ..models import FUSED, Teacher
from ..recipe import SynthesisJob, SynthesisRecipe, SynthesisView
from .objective import Compile, Objective, Precision, Terms


@dataclass(frozen=True, eq=False)
class Step:
    """The state of a job after one step; valid until the next step is requested.

    Attributes:
        number: Number of completed steps, 1 to `job.iterations`.
        pixels: The images, (B, C, H, W) float32 in the reference normalization; the next step changes them in place.
        mismatches: R of each BN teacher of this step, on the device like the terms.
        terms: Loss terms of this step. They stay on the device, so reading one waits for the device.
        state: Returns a copy of everything that the next step depends on, so that `synthesize` can resume from it.
    """

    number: int
    pixels: Tensor
    terms: Terms
    mismatches: Mapping[str, Tensor]
    lr: float
    state: Callable[[], dict[str, Tensor]]


def synthesize(
    job: SynthesisJob,
    settings: SynthesisRecipe,
    initial: Tensor,
    teachers: Mapping[str, Teacher],
    *,
    precision: Precision = "float32",
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    state: Mapping[str, Tensor] | None = None,
    compile: Compile = "auto",
) -> Generator[Step, None, None]:
    """Optimize the images of one job and yield after each step; a job with zero iterations yields nothing.

    Args:
        job: Classes, teachers, number of iterations and seed.
        settings: Settings of the objective and the optimizer.
        initial: Start images, (B, C, H, W) in the reference normalization, on the compute device; not modified.
        teachers: Logit teacher and BN pool by name, on the same device.
        precision: `bf16` runs the teachers under autocast.
        statistics: Statistics of each BN teacher from `gather_statistics`; required with `settings.conv`.
        state: A result of `Step.state` to resume from. On the CPU, the images equal those of an uninterrupted run exactly.
        compile: `on` compiles the teachers (results differ by rounding), `auto` replays CUDA graphs on a GPU.

    Example:
        >>> for step in synthesize(job, recipe.synthesis, initial, teachers):
        ...     print(step.number, float(step.terms.ce), float(step.terms.bn))
        >>> images_uint8 = to_uint8(step.pixels)
    """
    labels = torch.tensor(job.classes, device=initial.device)
    pixels = initial.detach().clone().contiguous(memory_format=torch.channels_last).requires_grad_()
    adam = torch.optim.Adam([pixels], lr=settings.lr, betas=settings.betas, fused=pixels.device.type in FUSED)
    generator = torch.Generator().manual_seed(job.seed)
    make = partial(Objective, job.teachers, settings, teachers, generator=generator)
    objective = make(precision=precision, statistics=statistics, compile=compile)
    if settings.bn_reduction == "balanced":
        objective.balance(initial)
    done = 0 if state is None else _restore(state, pixels, adam, generator, objective)
    for iteration in range(done, job.iterations):
        adam.param_groups[0]["lr"] = lr = learning_rate(settings, iteration, job.iterations)
        view = draw_view(pixels, settings.view, generator, progress=iteration / max(job.iterations - 1, 1))
        leaf = view.detach().requires_grad_()
        terms = objective.backward(leaf, labels, job.bn_teachers(iteration), logit=job.logit_teacher(iteration))
        adam.zero_grad(set_to_none=True)
        view.backward(leaf.grad)
        adam.step()
        if settings.clamp:
            clamp_(pixels.data)
        number = iteration + 1
        state_of = partial(_state, number, pixels, adam, generator, objective)
        yield Step(number, pixels.detach(), terms, objective.mismatches, lr, state_of)


def learning_rate(settings: SynthesisRecipe, iteration: int, iterations: int) -> float:
    """Return the learning rate of an iteration, counted from 0."""
    if settings.lr_schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def draw_view(images: Tensor, view: SynthesisView, generator: torch.Generator, *, progress: float = 1.0) -> Tensor:
    """Return A x: one random crop, flip and roll of the whole batch x, (B, C, H, W).

    Draws are made on the CPU, so they are the same on any device. `progress`, in [0, 1], drives the crop curriculum.
    """
    crop = draw_crop(1, images.shape[-1], crop_range(view, progress), generator)
    uniform = torch.rand(3, generator=generator)
    flip = (uniform[:1] < 0.5) & view.flip
    roll = (uniform[1:] * (view.jitter + 1)).long().clamp(max=view.jitter).tolist()
    return resample(images, crop, flip, roll=(roll[0], roll[1]))


def crop_range(view: SynthesisView, progress: float) -> tuple[float, float]:
    """Return the smallest and largest crop area, as shares of the image area, after this share of the iterations.

    Source: CDA (arXiv 2311.18838): global views first, local views later; the lower bound decreases along a half cosine.
    """
    low, high = view.crop_scale
    if view.curriculum == "cosine":
        low = high + (low - high) * 0.5 * (1 - math.cos(math.pi * progress))
    return low, high


def _state(
    number: int, pixels: Tensor, adam: torch.optim.Adam, generator: torch.Generator, objective: Objective
) -> dict[str, Tensor]:
    tensors = {"step": torch.tensor(number), "pixels": pixels.detach().clone(), "generator": generator.get_state()}
    tensors |= {f"adam/{key}": value.clone() for key, value in adam.state[pixels].items()}
    return tensors | objective.state()


def _restore(
    state: Mapping[str, Tensor], pixels: Tensor, adam: torch.optim.Adam, generator: torch.Generator, objective: Objective
) -> int:
    """Restore what `_state` returned; return the number of completed steps."""
    pixels.data.copy_(state["pixels"])
    generator.set_state(state["generator"])
    for key, value in state.items():
        if key.startswith("adam/"):
            # Keep the memory layout of the pixels: another layout may round differently in the last bit.
            moment = torch.empty_like(pixels).copy_(value) if value.shape == pixels.shape else value.clone()
            adam.state[pixels][key.removeprefix("adam/")] = moment
    objective.restore(state)
    return int(state["step"])
