"""Evaluation of an existing dataset: train students on it, and on random real images if they are available."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..dataset import DistilledDataset, load_distilled, versions
from ..errors import DataError, RecipeError, StageError, TeacherError
from ..evaluation import Source, epochs_of, keep_student
from ..images import SourceData, load_source, load_test_split
from ..models import check_network, check_optimizer, scored_on, source_facts
from ..recipe import Recipe, load_recipe, override_recipe, plan_jobs, public_recipe, to_dict
from ..runtime import EVERY_S, write_json
from .context import Run, make_accelerator
from .evaluate import fill_table, with_labels
from .folder import check_place, held_together
from .package import package_set
from .preflight import check_data
from .relabel import control_set, label
from .threads import check_threads, use_threads

T = TypeVar("T")


def evaluate_dataset(
    source: str,
    overrides: Sequence[str] = (),
    *,
    revision: str | None = None,
    test: str | None = None,
    teachers: Path | None = None,
    folder: Path | None = None,
    control: bool = True,
    threads: int | None = None,
    checkpoint_s: float = EVERY_S,
) -> tuple[Path, Path | None]:
    """Train students on a distilled dataset, and write the results table. The same call resumes an interrupted one.

    `source` is a folder or a Hub id. `overrides` change its protocol (`evaluation.key=value`). `test` is `DATA` or
    `DATA:SPLIT`, and replaces the recipe's test data. By default, `teachers` is the folder next to the dataset or else
    outputs/teachers, and `folder` is outputs/evaluate/<recipe name>.

    Returns:
        The path of report.json, and the folder of the student that was kept (`None` if none was).
    """
    if folder is not None:
        check_place(folder, "--output")
    accelerator = make_accelerator()
    with accelerator.main_process_first():
        distilled = load_distilled(source, revision=revision)
    recipe = _protocol(source, distilled, overrides)
    folder = folder or Path("outputs") / "evaluate" / recipe.name
    root = teachers or _nearest_teachers(source)
    run = Run(recipe, folder, root, accelerator, checkpoint_s, with_control=control)
    check_threads(run.work, threads)
    student = _evaluate(run, source, distilled, test, threads)
    return folder / "report.json", student if student.is_dir() else None


def _evaluate(run: Run, source: str, distilled: DistilledDataset, test: str | None, threads: int | None) -> Path:
    """Compute the rows of the table that are possible here, and write report.json. Return the folder for the student."""
    recipe, report, work, missing = run.recipe, run.folder / "report.json", run.work, dict[str, str]()
    tested = recipe if test is None else _with_test(recipe, test)
    data: SourceData | None
    if test is None:
        data = load_source(recipe.data)
        split = data.test
    else:
        data = _unless_missing(lambda: load_source(recipe.data), missing, "random real", "all real")
        split = load_test_split(recipe.data, tested.data.source, tested.data.test_split, distilled.class_names)
    if data is not None:
        run.loaded.data[recipe.data] = data
    notes = [] if data is None else check_data(run, split)
    # One folder per dataset and training data: another dataset of the same name must not reuse control and scores.
    run = replace(run, folder=run.folder / _digest(distilled.content, "" if data is None else data.train.content))
    # The key excludes the seeds, so that a call with more seeds reuses the students that are already trained.
    protocol = to_dict(replace(recipe, evaluation=replace(recipe.evaluation, seeds=(0,))))["evaluation"]
    key = _digest(json.dumps(protocol), split.content, *map(str, epochs_of(distilled, recipe.evaluation)))
    keep = partial(
        keep_student,
        folder=run.folder / f"student-{key}",
        distilled=distilled,
        settings=recipe.evaluation,
        source=source_facts(recipe, data),
        tested_on=scored_on(tested),
        test_count=len(split),
        dataset_id=None if Path(source).is_dir() else source,
    )
    with held_together(run):
        use_threads(run.accelerator, work, threads)
        for line in notes:
            run.say(line)
        sources = _sources(run, distilled, data, missing)
        judge = None if data is None else _unless_missing(lambda: run.judge, missing, "verifier and similarity")
        table = fill_table(run, sources, split, run.folder / f"students-{key}", keep=keep, missing=missing, judge=judge)
        if run.accelerator.is_main_process:
            facts = {
                "recipe": recipe.name,
                "dataset": source,
                "test": test or recipe.data.source,
                "evaluation": table,
                "settings": to_dict(recipe)["evaluation"],
                "hardware": run.hardware,
                "versions": versions(),
            }
            write_json(report, facts)
    return run.folder / f"student-{key}"


def _protocol(source: str, distilled: DistilledDataset, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of the dataset with overrides of its protocol. All settings of the images stay the same."""
    if distilled.recipe is None:
        raise DataError(f"{source!r} has no recipe.yaml, which names the test data and the protocol; add the file")
    wrong = [override for override in overrides if not override.startswith("evaluation.")]
    if wrong:
        raise RecipeError(f"override {wrong[0]!r}: only evaluation.* can change, since the images already exist")
    recipe, beside = distilled.recipe, Path(source).parent / "recipe.yaml"
    if Path(source).is_dir() and beside.is_file() and public_recipe(load_recipe(beside)) == recipe:
        recipe = load_recipe(beside)  # contains the full paths of local data
    recipe = override_recipe(recipe, overrides)
    channels, size = distilled.images_uint8.shape[1], distilled.images_uint8.shape[-1]
    check_network(recipe.evaluation.student, num_classes=len(distilled.class_names), channels=channels, size=size)
    check_optimizer(recipe.evaluation.optimizer)
    return recipe


def _nearest_teachers(source: str) -> Path:
    """Return the teachers folder next to a dataset or of the comparison it belongs to, or else outputs/teachers."""
    beside = [folder / "teachers" for folder in Path(source).parents[:4]]
    return next((folder for folder in beside if folder.is_dir()), Path("outputs") / "teachers")


def _with_test(recipe: Recipe, test: str) -> Recipe:
    """Return the recipe with DATA[:SPLIT] as its test data."""
    source, split = test, "test"
    if ":" in test and not Path(test).exists():
        source, _, split = test.rpartition(":")
    return replace(recipe, data=replace(recipe.data, source=source, test_split=split, validation_fraction=0.0))


def _unless_missing(load: Callable[[], T], missing: dict[str, str], *rows: str) -> T | None:
    """Return the result of `load`. If it is unavailable, return `None` and record the reason for the given rows."""
    try:
        return load()
    except (DataError, StageError, TeacherError) as error:
        missing |= dict.fromkeys(rows, f"not yet run: {error}")
        return None


def _sources(run: Run, distilled: DistilledDataset, data: SourceData | None, missing: dict[str, str]) -> dict[str, Source]:
    """Return the available image sources for students."""
    sources: dict[str, Source] = {"distilled": with_labels(run, distilled)}
    if data is not None:
        if run.recipe.data.has_all_images:
            sources["full"] = data.train
        if run.wants_control and (control := _unless_missing(lambda: _control(run, distilled), missing, "random real")):
            sources["random_real"] = control
    return sources


def _control(run: Run, distilled: DistilledDataset) -> DistilledDataset | None:
    """Return random real images labeled by the same teachers as the dataset; `None` if a class has too few images."""
    names = run.recipe.relabel.teachers
    loaded = run.teachers(names)
    for public, name in zip(public_recipe(run.recipe).relabel.teachers, names, strict=True):
        if distilled.teacher_weights.get(public) != loaded[name].weights_sha256:
            raise TeacherError(f"teacher {public!r} has other weights here than when it labeled the dataset")
    sets = control_set(run, plan_jobs(run.recipe))
    if not sets:
        return None
    label(run, sets)
    if run.accelerator.is_main_process:
        package_set(run, sets[0])
    run.accelerator.wait_for_everyone()
    with run.accelerator.main_process_first():
        return with_labels(run, load_distilled(run.control))


def _digest(*parts: str) -> str:
    """Return sixteen hex digits that identify a combination of parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
