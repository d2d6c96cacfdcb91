"""Students on a distilled dataset that was made elsewhere, beside random real images where they can be had."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..dataset import DistilledDataset, load_distilled, versions
from ..errors import DataError, RecipeError, StageError, TeacherError
from ..evaluation import NO_CONTROL, Source, keep_student
from ..images import ImageSplit, SourceData, load_source, load_test_split
from ..models import check_network, scored_on, source_facts
from ..recipe import Recipe, load_recipe, override_recipe, plan_jobs, public_recipe, to_dict
from ..runtime import EVERY_S, write_json
from .context import Run, make_accelerator
from .evaluate import collect, tasks_of, train_students
from .folder import check_place, held_together
from .package import package_control
from .relabel import control_set, label

T = TypeVar("T")


def evaluate_dataset(
    source: str,
    overrides: Sequence[str] = (),
    *,
    revision: str | None = None,
    test: str | None = None,
    teachers: Path | None = None,
    folder: Path | None = None,
    threads: int | None = None,
    checkpoint_s: float = EVERY_S,
) -> tuple[Path, Path | None]:
    """Train students on a distilled dataset, and write the honest table; the same call resumes an interrupted one.

    Args:
        source: A folder, or a Hub id.
        overrides: Changes of the protocol, `evaluation.key=value`.
        revision: Of a Hub dataset.
        test: Test data in place of the recipe's, `DATA` or `DATA:SPLIT`; a Hub id or a folder.
        teachers: Where squeezed teachers are; default: beside the dataset, or outputs/teachers.
        folder: Output folder; default: outputs/evaluate/<recipe name>.
        threads: CPU threads per process.
        checkpoint_s: Seconds between two checkpoints of a student.

    Returns:
        Path of report.json; folder of the student that was kept, `None` if none was.
    """
    if folder is not None:
        check_place(folder, "--output")
    accelerator = make_accelerator(threads=threads)
    with accelerator.main_process_first():
        distilled = load_distilled(source, revision=revision)
    recipe = _protocol(source, distilled, overrides)
    tested = recipe if test is None else _with_test(recipe, test)
    left_out: dict[str, str] = {}
    data, test_split = _real_data(recipe, tested, distilled.class_names, left_out)
    folder = folder or Path("outputs") / "evaluate" / recipe.name
    # One folder for all that control and scores depend on: another dataset of the same name must not find them.
    work = folder / _digest(distilled.content, "" if data is None else data.train.content)
    run = Run(recipe, work, teachers or _nearest_teachers(source), accelerator, checkpoint_s)
    student = run.folder / f"student-{_protocol_key(recipe, test_split)}"
    with held_together(run):
        evaluation = _score(run, distilled, data, test_split, left_out, student, source, tested)
        if accelerator.is_main_process:
            report = {"recipe": recipe.name, "dataset": source, "test": test or recipe.data.source}
            write_json(folder / "report.json", report | _results(run, evaluation))
    return folder / "report.json", student if student.is_dir() else None


def _protocol(source: str, distilled: DistilledDataset, overrides: Sequence[str]) -> Recipe:
    """The recipe of the dataset, with the protocol changed as asked; what made the images stays."""
    if distilled.recipe is None:
        raise DataError(f"{source!r} has no recipe.yaml, which names the test data and the protocol")
    wrong = [override for override in overrides if not override.startswith("evaluation.")]
    if wrong:
        raise RecipeError(f"override {wrong[0]!r}: only evaluation.* can change for images that exist already")
    recipe = override_recipe(_local_recipe(Path(source), distilled.recipe), overrides)
    channels, size = distilled.images_uint8.shape[1], distilled.images_uint8.shape[-1]
    check_network(recipe.evaluation.student, num_classes=len(distilled.class_names), channels=channels, size=size)
    return recipe


def _local_recipe(dataset: Path, shipped: Recipe) -> Recipe:
    """The recipe beside a dataset's folder, which names local data by their full path; else the one in it."""
    private = dataset.parent / "recipe.yaml"
    if dataset.is_dir() and private.is_file():
        recipe = load_recipe(private)
        if public_recipe(recipe) == shipped:
            return recipe
    return shipped


def _nearest_teachers(source: str) -> Path:
    """The teachers beside a dataset, or of the comparison that its run is part of; else those of all recipes."""
    beside = [folder / "teachers" for folder in Path(source).parents[:4]]
    return next((folder for folder in beside if folder.is_dir()), Path("outputs") / "teachers")


def _with_test(recipe: Recipe, test: str) -> Recipe:
    """The recipe with DATA[:SPLIT] as its test data."""
    source, split = test, "test"
    if ":" in test and not Path(test).exists():
        source, _, split = test.rpartition(":")
    return replace(recipe, data=replace(recipe.data, source=source, test_split=split, validation_fraction=0.0))


def _real_data(
    recipe: Recipe, tested: Recipe, class_names: Sequence[str], left_out: dict[str, str]
) -> tuple[SourceData | None, ImageSplit]:
    """The real data, which only other test data make dispensable, and the test images."""
    if tested is recipe:
        data = load_source(recipe.data)
        return data, data.test
    other = _unless_missing(lambda: load_source(recipe.data), left_out, "random real", "all real")
    return other, load_test_split(recipe.data, tested.data.source, tested.data.test_split, class_names)


def _unless_missing(load: Callable[[], T], left_out: dict[str, str], *rows: str) -> T | None:
    """What `load` returns; if it cannot be had here, these rows of the table are left out for that reason."""
    try:
        return load()
    except (DataError, StageError, TeacherError) as error:
        left_out |= dict.fromkeys(rows, f"not yet run: {error}")
        return None


def _score(
    run: Run,
    distilled: DistilledDataset,
    data: SourceData | None,
    test_split: ImageSplit,
    left_out: dict[str, str],
    student: Path,
    source: str,
    tested: Recipe,
) -> dict[str, Any]:
    """Train the students of every row that can be had."""
    recipe, judge = run.recipe, None
    sources: dict[str, Source] = {"distilled": distilled}
    if data is not None:
        run.loaded.data[recipe.data] = data
        sources["full"] = data.train
        if not recipe.evaluation.full_data_epochs:
            left_out["all real"] = "not yet run: evaluation.full_data_epochs is 0"
        if recipe.method == "random":
            left_out["random real"] = NO_CONTROL
        elif control := _unless_missing(lambda: _control(run, distilled), left_out, "random real"):
            sources["random_real"] = control
        judge = _unless_missing(lambda: run.judge, left_out, "verifier and similarity")
    tasks = tasks_of(run, sources, run.work / f"students-{_protocol_key(recipe, test_split)}", test=test_split)
    keep = partial(
        keep_student,
        folder=student,
        distilled=distilled,
        settings=recipe.evaluation,
        source=source_facts(recipe, data),
        tested_on=scored_on(tested),
        test_count=len(test_split),
        dataset_id=None if Path(source).is_dir() else source,
    )
    train_students(run, tasks, keep=keep)
    verifier = judge if recipe.teachers.verifier else None
    return collect(run, tasks, sources, left_out=left_out, verifier=verifier, network=judge)


def _control(run: Run, distilled: DistilledDataset) -> DistilledDataset:
    """Random real images, labeled by the very teachers that labeled the dataset."""
    names = run.recipe.relabel.teachers
    loaded = run.teachers(names)
    for public, name in zip(public_recipe(run.recipe).relabel.teachers, names, strict=True):
        if distilled.teacher_weights.get(public) != loaded[name].weights_sha256:
            raise TeacherError(f"teacher {public!r} here has other weights than the one that labeled the dataset")
    sets = control_set(run, plan_jobs(run.recipe))
    if not sets:
        raise DataError("a class has fewer real training images than ipc")
    label(run, sets)
    if run.accelerator.is_main_process:
        package_control(run, sets[0])
    run.accelerator.wait_for_everyone()
    with run.accelerator.main_process_first():
        return load_distilled(run.control)


def _protocol_key(recipe: Recipe, test_split: ImageSplit) -> str:
    """A name for the protocol and its test images; more seeds join the students that are trained already."""
    settings = to_dict(replace(recipe, evaluation=replace(recipe.evaluation, seeds=(0,))))["evaluation"]
    return _digest(json.dumps(settings), test_split.content)


def _digest(*parts: str) -> str:
    """Sixteen hex digits that name a combination of parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _results(run: Run, evaluation: Mapping[str, Any]) -> dict[str, object]:
    settings = to_dict(run.recipe)["evaluation"]
    return {"evaluation": evaluation, "settings": settings, "hardware": run.hardware, "versions": versions()}
