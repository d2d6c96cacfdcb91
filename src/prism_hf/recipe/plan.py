"""The plan of a run: images per batch, their teachers and their seeds, all determined by the recipe alone."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat

from ..runtime import derived_seed
from .schema import Recipe
from .sections import TeachersRecipe

STAGES = ("squeeze", "synthesize", "relabel", "package", "evaluate")
"""The stages of a run, in order."""
TRACKERS = ("tensorboard", "wandb", "trackio")
"""Experiment trackers that can record losses and images, through Accelerate."""


@dataclass(frozen=True, slots=True)
class SynthesisJob:
    """One batch of images to optimize. Its result does not depend on rank, process count, job order or interruptions."""

    id: int  # 0 to the number of jobs - 1
    classes: tuple[int, ...]  # class of each image
    slots: tuple[int, ...]  # slot of each image
    iterations: int  # Adam steps; 0 ships the start images unchanged
    seed: int  # seed of the job's own generator (init noise, views)
    draw_key: str  # identifies the teacher draw; jobs of one slot share it
    teachers: TeachersRecipe
    recipe_seed: int

    def logit_teacher(self, iteration: int) -> str:
        """Return the teacher of the classification loss in one iteration: always the same, except in selection `cycle`."""
        names = self.teachers.synthesis_names
        return names[iteration % len(names)] if self.teachers.selection == "cycle" else self.teachers.logit

    def bn_teachers(self, iteration: int) -> tuple[str, ...]:
        """Return the BN teachers of one iteration. The logit teacher comes first if it is one of them."""
        rule = self.teachers
        if rule.selection == "cycle":
            return (self.logit_teacher(iteration),)
        key = self.draw_key if rule.selection == "per_slot" else f"{self.draw_key}/job{self.id}/{iteration}"
        rng = random.Random(derived_seed(self.recipe_seed, "bn teachers", key))
        pool, drawn = list(rule.bn_pool), []
        for _ in range(rule.extras):
            # Both numbers are always drawn, so that the outcome of one draw does not change the next.
            wanted, position = rng.random() < rule.draw_probability, rng.random()
            if wanted and pool:
                drawn.append(pool.pop(int(position * len(pool))))
        return ((rule.logit,) if rule.include_logit else ()) + tuple(drawn)


def plan_jobs(recipe: Recipe) -> list[SynthesisJob]:
    """Return all synthesis jobs of a recipe. Every (class, slot) is in exactly one job.

    Example:
        >>> [job.id for job in plan_jobs(recipe)]
        [0, 1]
    """
    jobs: list[SynthesisJob] = []
    ladder = recipe.synthesis.ladder
    for draw_key, classes, slots in _batches(recipe):
        fewer = ladder.step * (slots[0] % ladder.period) if ladder else 0
        jobs.append(
            SynthesisJob(
                id=len(jobs),
                classes=classes,
                slots=slots,
                iterations=0 if recipe.method == "random" else recipe.synthesis.iterations - fewer,
                seed=derived_seed(recipe.seed, "job", len(jobs)),
                draw_key=draw_key,
                teachers=recipe.teachers,
                recipe_seed=recipe.seed,
            )
        )
    return jobs


Images = tuple[tuple[int, ...], tuple[int, ...]]
"""The class and the slot of each image of a batch."""


def _batches(recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield the name of the teacher draw, and the class and slot of each image, for each batch.

    Equal tuples are one object: a plan of ten million images has few different ones.
    """
    synthesis, ipc, classes = recipe.synthesis, recipe.synthesis.ipc, recipe.data.distilled_classes
    if recipe.method == "random":
        for images in _class_major(classes, ipc, classes * ipc):
            yield ("random", *images)
    elif synthesis.batch_order == "within_class":
        for number, images in enumerate(_class_major(classes, ipc, synthesis.batch_size)):
            yield (f"batch{number}", *images)
    else:
        group: list[Images] = []
        for first in range(0, ipc, synthesis.slots_per_batch):
            count = min(synthesis.slots_per_batch, ipc - first)
            if first == 0 or count < synthesis.slots_per_batch:  # only the last group can be smaller
                group = _class_major(classes, count, synthesis.batch_size)
            moved = {slots: tuple(first + slot for slot in slots) for slots in {slots for _, slots in group}}
            for labels, slots in group:
                yield f"slot{first}", labels, moved[slots]


def _class_major(classes: int, count: int, size: int) -> list[Images]:
    """Return the batches of `size` images of slots 0..count-1 of every class.

    Class-major: if `size` is below the size of a group of slots, the images of a class stay together.
    """
    slots, batches = tuple(range(count)), []
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    for part in batch_ranges(classes * count, size):
        labels = range(part.start // count, (part.stop - 1) // count + 1)
        spans = [(c, max(part.start - c * count, 0), min(part.stop - c * count, count)) for c in labels]
        of_class = tuple(chain.from_iterable(repeat(c, stop - start) for c, start, stop in spans))
        of_slot = tuple(chain.from_iterable(slots[start:stop] for _, start, stop in spans))
        batches.append((known.setdefault(of_class, of_class), known.setdefault(of_slot, of_slot)))
    return batches


def batch_ranges(count: int, size: int) -> list[range]:
    """Split 0..count-1 into batches of `size`. Nothing is dropped; a single remaining image joins the batch before it.

    A batch of one has no statistics: BatchNorm cannot train on it, and BN alignment is meaningless.
    """
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]
