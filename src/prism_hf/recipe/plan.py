"""The plan of a run: images per batch, their teachers and their seeds, all determined by the recipe alone."""

import random
from dataclasses import dataclass

from ..runtime import derived_seed
from .schema import Recipe
from .sections import TeachersRecipe

STAGES = ("squeeze", "synthesize", "relabel", "package", "evaluate")
"""The stages of a run, in order."""
TRACKERS = ("tensorboard", "wandb", "trackio")
"""Experiment trackers that can record losses and images, through Accelerate."""


@dataclass(frozen=True)
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
    for draw_key, images in _batches(recipe):
        classes, slots = zip(*images, strict=True)
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


def _batches(recipe: Recipe) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return the name of the teacher draw and the (class, slot) of each image, for each batch."""
    synthesis, ipc = recipe.synthesis, recipe.synthesis.ipc

    def batches(slots: range) -> list[list[tuple[int, int]]]:
        # Class-major: if batch_size is below the size of a group of slots, the images of a class stay together.
        order = [(c, s) for c in range(recipe.data.num_classes) for s in slots]
        size = len(order) if recipe.method == "random" else synthesis.batch_size
        return [order[part.start : part.stop] for part in batch_ranges(len(order), size)]

    if recipe.method == "random":
        return [("random", batch) for batch in batches(range(ipc))]
    if synthesis.batch_order == "within_class":
        return [(f"batch{number}", batch) for number, batch in enumerate(batches(range(ipc)))]
    firsts = range(0, ipc, synthesis.slots_per_batch)
    groups = [range(first, min(first + synthesis.slots_per_batch, ipc)) for first in firsts]
    return [(f"slot{slots.start}", batch) for slots in groups for batch in batches(slots)]


def batch_ranges(count: int, size: int) -> list[range]:
    """Split 0..count-1 into batches of `size`. Nothing is dropped; a single remaining image joins the batch before it.

    A batch of one has no statistics: BatchNorm cannot train on it, and BN alignment is meaningless.
    """
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]
