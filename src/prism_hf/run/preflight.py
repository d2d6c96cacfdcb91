"""Checks before a run: problems are reported before anything costs time or is written."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import datasets
import timm

from ..errors import OutputError, RecipeError, StageError, TeacherError
from ..images import ImageSplit, describe_source, faults_of
from ..method import Alignment, check_candidates, data_norms, real_rows
from ..models import (
    Teacher,
    architecture_of,
    check_batch,
    check_network,
    check_optimizer,
    classifier_of,
    input_size_of,
)
from ..recipe import NO_IMAGES, STAGES, Recipe, cache_needed, space_needed
from ..runtime import local_folder, read_json, size_text, write_json
from .context import Run
from .folder import check_place
from .status import bytes_below

INPUTS = "inputs.json"


def check(run: Run, *, fresh: bool = False, space: bool = True) -> None:
    """Check everything that can go wrong: disk space, Hub teachers, data, images per class. Writes nothing.

    With `fresh`, an earlier run in the folder is ignored, since it will be moved aside. Without `space`, the caller checks
    the disk space, as a comparison does for all its runs together.
    """
    recipe, data = run.recipe, run.recipe.data
    check_place(run.teachers_root, "--teachers")
    check_apart(run.folder, data.source)
    if space:
        check_space(missing_space(run), run.folder, cached=cache_needed(recipe, control=run.wants_control))
    check_network(recipe.evaluation.student, num_classes=data.num_classes, channels=data.channels, size=data.size)
    check_optimizer(recipe.evaluation.optimizer)
    check_architectures(recipe)
    loaded = run.teachers(_not_squeezed(recipe))
    for name in set(loaded) & set(recipe.bn_candidates):
        Alignment(loaded[name].model, name=name)
        if data.source == NO_IMAGES and data_norms(loaded[name].model):
            raise TeacherError(
                f"BN teacher {name!r} has no BatchNorm, so its statistics are those of real images, but data.source is "
                "none; name another one, or real data"
            )
    check_verifier(recipe, loaded)
    check_batch(recipe, run.data)
    if recipe.synthesis.init != "noise":
        real_rows(run.data, recipe.synthesis.ipc, seed=recipe.seed)
    check_candidates(run.data, recipe.synthesis)
    # Always computed, since it decodes images of both splits: an unreadable one is reported before anything is written.
    inputs, current = run.work / INPUTS, _inputs_of(run)
    if not fresh and inputs.is_file() and read_json(inputs) != current:
        raise OutputError(
            f"the data or the teachers of this run have changed since it was started (see {inputs}), so they do not match "
            "its finished files; use another folder (--output DIR)"
        )


def check_data(run: Run, test: ImageSplit | None = None) -> list[str]:
    """Refuse real data whose test images are training images. Return lines for the log: what is used, and its faults.

    `test` replaces the test split of the recipe.
    """
    data = run.data if test is None else replace(run.data, test=test)
    return [describe_source(data, run.recipe.data), *(f"warning: {fault}" for fault in faults_of(data, run.recipe.data))]


def check_stage(run: Run, stage: str, *, fresh: bool = False) -> None:
    """Raise a `StageError` if the earlier stages have not made what a stage needs. Writes nothing."""
    if stage == "squeeze":
        return
    if stage != "synthesize" and (fresh or not (run.folder / "recipe.yaml").is_file()):
        before = STAGES[STAGES.index(stage) - 1]
        raise StageError(f"{run.folder} contains no run to {stage}; run --stage {before} and earlier stages first")
    for name in run.recipe.squeezed_teachers:
        run.trained_folder(name)


def record_inputs(run: Run) -> None:
    """Record what the names in the recipe refer to, so that a later launch detects a change."""
    write_json(run.work / INPUTS, _inputs_of(run))


def _inputs_of(run: Run) -> dict[str, object]:
    """Return the hashes of what the recipe refers to now: the data, and the teachers that are not squeezed."""
    weights = {name: teacher.weights_sha256 for name, teacher in run.teachers(_not_squeezed(run.recipe)).items()}
    return {"train": run.data.train.content, "test": run.data.test.content, "teachers": dict(sorted(weights.items()))}


def _not_squeezed(recipe: Recipe) -> list[str]:
    return [name for name in recipe.all_teachers if name not in recipe.squeezed_teachers]


def missing_space(run: Run) -> int:
    """Return the maximum number of bytes that a run still needs on disk, less the files already in its folder."""
    processes = run.accelerator.num_processes
    needed = sum(space_needed(run.recipe, processes=processes, control=run.wants_control).values())
    return max(0, needed - bytes_below(run.work, run.dataset, run.control))


def check_space(missing: int, folder: Path, *, cached: int = 0) -> None:
    """Raise an `OutputError` if a disk has less free space than a run still needs on it.

    `missing` bytes are needed in `folder`, and `cached` bytes in the cache of `datasets`, which may be on the same disk.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    if _existing(cache).stat().st_dev == _existing(folder).stat().st_dev:
        missing, cached = missing + cached, 0
    for needed, place, option in ((missing, folder, "--output DIR"), (cached, cache, "HF_DATASETS_CACHE")):
        free = shutil.disk_usage(_existing(place)).free
        if needed > free:
            what = "output" if place == folder else "the cache of `datasets`,"
            raise OutputError(
                f"{what} {str(place)!r} needs about {size_text(needed)}, but only {size_text(free)} is free; make space, "
                f"use another disk ({option}), or lower synthesis.ipc or relabel.epochs"
            )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def check_verifier(recipe: Recipe, loaded: Mapping[str, Teacher]) -> None:
    """Refuse a verifier without features, or with the architecture of a network in the loss, under any name.

    `loaded` has the teachers that are not squeezed.
    """
    name = recipe.teachers.verifier
    if name is None:
        return

    def architecture(teacher: str) -> str:
        return loaded[teacher].architecture if teacher in loaded else architecture_of(teacher)

    for teacher in recipe.teachers.synthesis_names:
        if architecture(teacher) == architecture(name):
            raise RecipeError(
                f"verifier {name!r} has the architecture of teacher {teacher!r} ({architecture(name)}); a verifier must be "
                "held out; name another architecture"
            )
    if name in loaded and classifier_of(loaded[name].model) is None:
        raise TeacherError(f"verifier {name!r} has no linear classifier to take features from; name another one")


def check_apart(folder: Path, source: str) -> None:
    """Refuse an output folder inside the data folder: the next launch would read the output as data."""
    data = None if source in ("digits", NO_IMAGES) else local_folder(source)
    if data is not None and folder.resolve().is_relative_to(data.resolve()):
        raise OutputError(f"output {str(folder)!r} is inside the data {source!r}; use another folder (--output DIR)")


def check_architectures(recipe: Recipe) -> None:
    """Raise a `TeacherError` before any training if a `squeeze:` architecture is not in timm or not usable in its role."""
    for name in recipe.squeezed_teachers:
        architecture = architecture_of(name)
        if not timm.is_model(architecture):
            raise TeacherError(f"teacher {name!r}: timm has no such architecture; timm.list_models() lists all")
        size = input_size_of(name, recipe)
        network = check_network(architecture, num_classes=recipe.data.num_classes, channels=3, size=size)
        if name in recipe.bn_candidates:
            Alignment(network, name=name)
        if name == (recipe.teachers.verifier or recipe.teachers.logit) and classifier_of(network) is None:
            fix = "name another verifier" if recipe.teachers.verifier else "set teachers.verifier to a network that has one"
            raise TeacherError(
                f"teacher {name!r} has no linear classifier, so its features cannot measure similarity; {fix}"
            )
