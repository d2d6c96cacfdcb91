"""The checks before the work: what is wrong with a run is told before anything costs time or is written."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import timm

from ..errors import OutputError, RecipeError, StageError, TeacherError
from ..images import local_folder
from ..method import Alignment, check_candidates, real_rows
from ..models import Teacher, check_batch, check_network, classifier_of
from ..recipe import SQUEEZE_PREFIX, STAGES, Recipe, space_needed
from ..runtime import read_json, size_text, write_json
from .context import Run
from .folder import check_place
from .status import bytes_below

INPUTS = "inputs.json"


def check(run: Run, *, fresh: bool = False, space: bool = True) -> None:
    """Look at everything that can be wrong: disk space, Hub teachers, the data, images per class; writes nothing.

    With `fresh`, what an earlier run left in the folder does not count: it will be moved aside. Without `space`, the caller
    looks at the disk, as a comparison does for all its runs.
    """
    recipe, data = run.recipe, run.recipe.data
    check_place(run.teachers_root, "--teachers")
    check_apart(run.folder, data.source)
    if space:
        check_space(missing_space(run), run.folder)
    check_network(recipe.evaluation.student, num_classes=data.num_classes, channels=data.channels, size=data.size)
    check_architectures(recipe)
    loaded = run.teachers(_not_squeezed(recipe))
    for name in set(loaded) & set(recipe.bn_candidates):
        Alignment(loaded[name].model, name=name)
    check_verifier(recipe, loaded)
    check_batch(recipe, run.data)
    if recipe.synthesis.init != "noise":
        real_rows(run.data, recipe.synthesis.ipc, seed=recipe.seed)
    check_candidates(run.data, recipe.synthesis)
    # Always asked, since it decodes images of both parts: one that cannot be read is told before anything is written.
    inputs, now = run.work / INPUTS, _inputs_of(run)
    if not fresh and inputs.is_file() and read_json(inputs) != now:
        raise OutputError(
            f"the data or the teachers of this run have changed since it was started (see {inputs}); what is finished "
            "there would not fit. Use another folder (--output DIR)"
        )


def check_stage(run: Run, stage: str, *, fresh: bool = False) -> None:
    """Find out whether a stage can begin where the stages before it stopped, else raise a `StageError`; writes nothing."""
    if stage == "squeeze":
        return
    if stage != "synthesize" and (fresh or not (run.folder / "recipe.yaml").is_file()):
        before = STAGES[STAGES.index(stage) - 1]
        raise StageError(f"{run.folder} holds no run to {stage}; run --stage {before}, and what comes before it")
    for name in run.recipe.squeezed_teachers:
        run.trained_folder(name)


def record_inputs(run: Run) -> None:
    """Keep what the names in the recipe stood for, so that a later launch notices a change behind them."""
    write_json(run.work / INPUTS, _inputs_of(run))


def _inputs_of(run: Run) -> dict[str, object]:
    """What the names in a recipe stand for now: contents of the data, weights of the teachers that are not squeezed."""
    weights = {name: teacher.weights_sha256 for name, teacher in run.teachers(_not_squeezed(run.recipe)).items()}
    return {"train": run.data.train.content, "test": run.data.test.content, "teachers": dict(sorted(weights.items()))}


def _not_squeezed(recipe: Recipe) -> list[str]:
    return [name for name in recipe.all_teachers if name not in recipe.squeezed_teachers]


def missing_space(run: Run) -> int:
    """Bytes that a run still needs on the disk, at most; what is in its folder already counts as done."""
    processes = run.accelerator.num_processes
    needed = sum(space_needed(run.recipe, processes=processes, control=run.wants_control).values())
    return max(0, needed - bytes_below(run.work, run.dataset, run.control))


def check_space(missing: int, folder: Path) -> None:
    """Compare the bytes that are still needed with what is free, before anything is written."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise OutputError(
            f"output {str(folder)!r} needs about {size_text(missing)} and {size_text(free)} are free; make space, "
            "use another disk (--output DIR), or lower synthesis.ipc or relabel.epochs"
        )


def check_verifier(recipe: Recipe, loaded: Mapping[str, Teacher]) -> None:
    """Refuse a verifier of the architecture of a network in the loss, whatever it is called, or one without features.

    `loaded` are the teachers that are not squeezed.
    """
    name = recipe.teachers.verifier
    if name is None:
        return

    def architecture(teacher: str) -> str:
        return loaded[teacher].architecture if teacher in loaded else teacher.removeprefix(SQUEEZE_PREFIX)

    for teacher in recipe.teachers.synthesis_names:
        if architecture(teacher) == architecture(name):
            raise RecipeError(
                f"verifier {name!r} has the architecture of teacher {teacher!r} ({architecture(name)}); a verifier must be "
                "held out, name another architecture"
            )
    if name in loaded and classifier_of(loaded[name].model) is None:
        raise TeacherError(f"verifier {name!r} has no linear classifier to take features from; name another one")


def check_apart(folder: Path, source: str) -> None:
    """Refuse an output folder inside the data: what is written there would be read as data by the next launch."""
    data = None if source == "digits" else local_folder(source)
    if data is not None and folder.resolve().is_relative_to(data.resolve()):
        raise OutputError(f"output {str(folder)!r} is inside the data {source!r}; use another folder (--output DIR)")


def check_architectures(recipe: Recipe) -> None:
    """Fail before any training if a `squeeze:` name is not a timm architecture, or could never align anything."""
    for name in recipe.squeezed_teachers:
        architecture = name.removeprefix(SQUEEZE_PREFIX)
        if not timm.is_model(architecture):
            raise TeacherError(f"teacher {name!r}: timm knows no such architecture; timm.list_models() lists all")
        network = check_network(architecture, num_classes=recipe.data.num_classes, channels=3, size=recipe.data.size)
        if name in recipe.bn_candidates:
            Alignment(network, name=name)
        if name == (recipe.teachers.verifier or recipe.teachers.logit) and classifier_of(network) is None:
            raise TeacherError(
                f"teacher {name!r} has no linear classifier, so its features cannot measure similarity; "
                "name another verifier"
            )
