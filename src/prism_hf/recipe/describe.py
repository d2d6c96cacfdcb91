"""A description of a run and its disk space, from the recipe alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb

from ..runtime import count_text, size_text
from .plan import SynthesisJob, plan_jobs
from .schema import Recipe
from .sections import NO_IMAGES, TeachersRecipe

GPU_MS, GPU_MS_MORE, GPU_WITHOUT_GRAPHS = 0.119, 0.152, 2.4
"""Milliseconds per image-iteration at 224 pixels on an H200, bf16: ResNet-18, and the mean of MobileNetV2 and
EfficientNet-B0 (benchmarks/results/gpu.json); and the factor where steps are not recorded as CUDA graphs."""
ESTIMATE = "estimate from steps of ResNet-18, MobileNetV2 and EfficientNet-B0; labels and students not measured"

COUNTED = 10_000
"""Draws of BN teachers that a description counts one by one."""


def describe_plan(recipe: Recipe, *, control: bool = True) -> str:
    """Describe what a run will do, from the recipe alone, for `--dry-run`; without `control`, as `--no-control` does."""
    jobs, data, teachers, relabel = plan_jobs(recipe), recipe.data, recipe.teachers, recipe.relabel
    exact, drawn = _steps_of_teachers(teachers, jobs)
    steps = sum(job.iterations for job in jobs)
    image_steps = sum(job.iterations * len(job.classes) for job in jobs)
    stored = recipe.stored_labels
    views = recipe.num_images * stored.epochs
    labels = views * stored.row_bytes(data.num_classes)
    random = recipe.method == "random"
    logit = "each teacher in turn" if teachers.selection == "cycle" else teachers.logit
    hours = gpu_hours(recipe, image_steps, {name: count / steps for name, count in drawn.items()} if steps else {})
    source = "no real images" if data.source == NO_IMAGES else data.source
    classes = f"{data.num_classes} classes"
    if data.distilled_classes < data.num_classes:
        classes = f"{data.distilled_classes} of {classes}"
    lines = [
        f"{recipe.name} (fingerprint {recipe.fingerprint()})",
        f"data      {source}: {classes}, {data.channels} x {data.size} x {data.size}",
        f"images    {recipe.num_images} ({recipe.synthesis.ipc} per class), "
        + ("real images drawn at random" if random else f"init {recipe.synthesis.init}"),
        f"jobs      {len(jobs)} of up to {max(len(j.classes) for j in jobs)} images, {recipe.synthesis.batch_order}",
        f"steps     {steps:,} in total ({image_steps:,} image-iterations)",
        f"logit     {'none (method random)' if random else logit}",
    ]
    for name in teachers.synthesis_names if steps else ():
        count = round(drawn[name])
        about = "" if exact or count in (0, steps) else "about "
        lines.append(f"BN        {name}: in {about}{count:,} of {count_text(steps, 'step')} ({drawn[name] / steps:.0%})")
    if hours is not None:
        lines.append(f"GPU       {hours:.2g} hours of synthesis on one H200 in bf16 ({ESTIMATE})")
    with_control = control and not random and data.source != NO_IMAGES
    lines += [
        f"control   {_control_text(recipe, control=control)}",
        f"verifier  {teachers.verifier or 'none'}",
        f"relabel   {', '.join(relabel.teachers)} ({relabel.ensemble}), {_epochs_text(recipe)}",
        f"squeeze   {', '.join(recipe.squeezed_teachers) or 'nothing'}",
        f"students  {recipe.evaluation.student}, {count_text(len(recipe.evaluation.seeds), 'seed')}",
        f"bytes     images at most {size_text(recipe.num_images * data.channels * data.size**2)} "
        f"(raw pixels; {recipe.packaging.image_format} is smaller), labels about {size_text(labels)} in {views:,} views "
        f"({stored.codec})",
        f"disk      about {size_text(sum(space_needed(recipe, control=with_control).values()))} for the whole run"
        + (", including the control" if with_control else "")
        + f"; {size_text(cache_needed(recipe, control=with_control))} in the cache of `datasets` to train students",
    ]
    return "\n".join(lines)


def _control_text(recipe: Recipe, *, control: bool) -> str:
    if recipe.data.source == NO_IMAGES:
        return "none: there are no real images"
    if recipe.method == "random":
        return "none: these are random real images, the control that other methods are compared with"
    return "as many random real images, relabeled by the same teachers" if control else "none (--no-control)"


def _epochs_text(recipe: Recipe) -> str:
    stored, epochs = recipe.stored_labels.epochs, count_text(recipe.relabel.epochs, "epoch")
    if stored == recipe.relabel.epochs:
        return f"{epochs} of views"
    return f"labels of {count_text(stored, 'epoch')} of views, reused for {epochs}"


def gpu_hours(recipe: Recipe, image_steps: int, shares: Mapping[str, float]) -> float | None:
    """Estimate the GPU hours of synthesis. `shares` is the share of steps in which each network is a BN teacher.

    It is `None` without steps, and for small images, whose steps were not measured on a GPU.
    """
    if not image_steps or recipe.data.size < 128:
        return None
    teachers = recipe.teachers
    if teachers.selection == "cycle":
        per_step = (GPU_MS + GPU_MS_MORE * len(teachers.bn_pool)) / len(teachers.synthesis_names)
    else:
        per_step = GPU_MS + GPU_MS_MORE * sum(share for name, share in shares.items() if name != teachers.logit)
    if recipe.synthesis.conv is not None or recipe.synthesis.momentum:
        per_step *= GPU_WITHOUT_GRAPHS
    return image_steps * per_step * (recipe.data.size / 224) ** 2 / 3.6e6


def _steps_of_teachers(rule: TeachersRecipe, jobs: Sequence[SynthesisJob]) -> tuple[bool, dict[str, float]]:
    """Return the number of steps with each BN teacher, and whether it is exact. With many draws, it is the expectation."""
    first = {job.draw_key: job for job in reversed(jobs)} if rule.selection == "per_slot" else {}
    exact = rule.selection == "cycle" or 0 < len(first) <= COUNTED
    drawn, total = dict.fromkeys(rule.synthesis_names, 0.0), sum(job.iterations for job in jobs)
    if not exact:
        return exact, dict.fromkeys(rule.bn_pool, total * _chance(rule)) | {rule.logit: total * rule.include_logit}
    names = {key: job.bn_teachers(0) for key, job in first.items()}
    for (key, iterations), count in Counter((job.draw_key, job.iterations) for job in jobs).items():
        for turn, name in enumerate(names.get(key, rule.synthesis_names)):
            # With `cycle`, the teachers take turns.
            drawn[name] += count * (iterations if names else len(range(turn, iterations, len(drawn))))
    return exact, drawn


def _chance(rule: TeachersRecipe) -> float:
    """Return the probability that a teacher of the pool is drawn: the expected number of teachers drawn, per teacher."""
    extras, chance, pool = rule.extras, rule.draw_probability, len(rule.bn_pool)
    # A draw that succeeds after the pool is empty adds nothing.
    few = [comb(extras, wins) * chance**wins * (1 - chance) ** (extras - wins) for wins in range(min(pool, extras + 1))]
    return 1 - sum((pool - wins) / pool * value for wins, value in enumerate(few))


def space_needed(recipe: Recipe, *, processes: int = 1, control: bool = True) -> dict[str, int]:
    """Return the maximum number of bytes that a run needs on disk, by kind, without teachers and students.

    Images are kept as they come from synthesis. Those of the distilled set, and of its control if there is one, are also
    kept encoded, and decoded for the teachers. Each process has a checkpoint (pixels and two moments), and a second one
    while the first is replaced. Evaluation also needs `cache_needed`.
    """
    data, sets = recipe.data, 2 if control else 1
    pixels = recipe.num_images * data.channels * data.size**2
    stored = recipe.stored_labels
    labels = recipe.num_images * (stored.epochs * stored.row_bytes(data.num_classes) + 2 * data.num_classes)
    batch = min(recipe.synthesis.batch_size + 1, recipe.num_images) * data.channels * data.size**2
    return {"images": (1 + 2 * sets) * pixels, "labels": sets * labels, "checkpoints": 2 * processes * 3 * 4 * batch}


def cache_needed(recipe: Recipe, *, control: bool = True) -> int:
    """Return the bytes that training students needs in the cache of `datasets`: decoded images and their own logits.

    Views and their logits are read from the Parquet files in place.
    """
    data, sets = recipe.data, 2 if control else 1
    return sets * recipe.num_images * (data.channels * data.size**2 + 2 * data.num_classes)
