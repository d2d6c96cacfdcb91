"""Students on a distilled dataset that was made elsewhere, beside random real images where they can be had."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..dataset.reader import DistilledDataset, load_distilled
from ..dataset.writer import versions
from ..errors import DataError, RecipeError, StageError, TeacherError
from ..evaluation.report import NO_CONTROL, Evaluation
from ..evaluation.students import Keep
from ..images.source import ImageSplit, SourceData, load_source, load_test_split
from ..models.build import check_network
from ..models.folder import scored_on, source_facts
from ..models.teacher import Teacher
from ..recipe.schema import Recipe, to_dict
from ..recipe.yaml_file import load_recipe, override_recipe, public_recipe
from ..runtime.stop import EVERY_S
from ..runtime.store import write_json
from .context import Run, check_place, held, make_accelerator
from .scores import Contest, evaluate_contest
from .stages import Stages

T = TypeVar("T")


@dataclass(frozen=True)
class DatasetScores:
    """What an evaluation has left.

    Attributes:
        report: Every figure of the table.
        path: The report as JSON.
        student: Folder of the student that was kept, for timm and transformers; `None` if there is none.
    """

    report: dict[str, Any]
    path: Path
    student: Path | None


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
) -> DatasetScores:
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

    Raises:
        PrismError: One line on what cannot be used.
    """
    if folder is not None:
        check_place(folder, "--output")
    accelerator = make_accelerator(threads=threads)
    with accelerator.main_process_first():
        distilled = load_distilled(source, revision=revision)
    recipe = _protocol(source, distilled, overrides)
    channels, size = distilled.images_uint8.shape[1], distilled.images_uint8.shape[-1]
    check_network(recipe.evaluation.student, num_classes=len(distilled.class_names), channels=channels, size=size)
    folder = folder or Path("outputs") / "evaluate" / recipe.name
    real = _real_data(recipe, test, distilled.class_names)
    # One folder for all that control and scores depend on: another dataset of the same name must not find them.
    work = folder / _digest(distilled.content, "" if real.data is None else real.data.train.content)
    run = Run(recipe, work, teachers or _nearest_teachers(source), accelerator, checkpoint_s)
    with held(run):
        return _score(run, source, distilled, real, test, folder / "report.json")


# -- the protocol -----------------------------------------------------------------------------------------------------


def _protocol(source: str, distilled: DistilledDataset, overrides: Sequence[str]) -> Recipe:
    """The recipe of the dataset, with the protocol changed as asked; what made the images stays."""
    if distilled.recipe is None:
        raise DataError(f"{source!r} has no recipe.yaml, which names the test data and the protocol")
    wrong = [override for override in overrides if not override.startswith("evaluation.")]
    if wrong:
        raise RecipeError(f"override {wrong[0]!r}: only evaluation.* can change for images that exist already")
    return override_recipe(_local_recipe(Path(source), distilled.recipe), overrides)


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


def _digest(*parts: str) -> str:
    """Sixteen hex digits that name a combination of parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# -- the real data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _RealData:
    """The test images, and the other real data or the reason why they cannot be had."""

    test: ImageSplit
    data: SourceData | None
    missing: str | None = None


def _real_data(recipe: Recipe, test: str | None, class_names: Sequence[str]) -> _RealData:
    if test is None:
        data = load_source(recipe.data)
        return _RealData(data.test, data)
    other, missing = _or_reason(lambda: load_source(recipe.data))
    return _RealData(load_test_split(recipe.data, *_source_and_split(test), class_names), other, missing)


def _or_reason(load: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `load` returns, or the reason why it cannot be had."""
    try:
        return load(), None
    except (DataError, StageError, TeacherError) as error:
        return None, f"not yet run: {error}"


def _source_and_split(test: str) -> tuple[str, str]:
    """The two parts of DATA[:SPLIT]."""
    if ":" in test and not Path(test).exists():
        source, _, split = test.rpartition(":")
        return source, split
    return test, "test"


def _tested_recipe(recipe: Recipe, test: str | None) -> Recipe:
    """The recipe with the test data that were asked for."""
    if test is None:
        return recipe
    source, split = _source_and_split(test)
    return replace(recipe, data=replace(recipe.data, source=source, test_split=split, validation_fraction=0.0))


def _control(stages: Stages, distilled: DistilledDataset) -> DistilledDataset:
    """Random real images, labeled by the very teachers that labeled the dataset."""
    public = public_recipe(stages.recipe).relabel.teachers
    loaded = stages.teachers(stages.recipe.relabel.teachers)
    for name, teacher in zip(public, loaded.values(), strict=True):
        if distilled.teacher_weights.get(name) != teacher.weights_sha256:
            raise TeacherError(f"teacher {name!r} here has other weights than the one that labeled the dataset")
    stages.build_control()
    with stages.run.accelerator.main_process_first():
        return load_distilled(stages.run.control)


def _judge(stages: Stages) -> Teacher:
    """The network that judges images and measures their similarity."""
    judge = stages.recipe.teachers.verifier or stages.recipe.teachers.logit
    return stages.teachers([judge])[judge]


# -- the scores -------------------------------------------------------------------------------------------------------


def _score(
    run: Run, source: str, distilled: DistilledDataset, real: _RealData, test: str | None, path: Path
) -> DatasetScores:
    """Train the students, and write the report."""
    recipe, stages = run.recipe, Stages(run)
    left_out: dict[str, str | None] = {}
    control = judge = None
    if real.data is None:
        left_out |= dict.fromkeys(("random real", "all real"), real.missing)
    else:
        if not recipe.evaluation.full_data_epochs:
            left_out["all real"] = "not yet run: evaluation.full_data_epochs is 0"
        if recipe.method == "random":
            left_out["random real"] = NO_CONTROL
        else:
            control, left_out["random real"] = _or_reason(lambda: _control(stages, distilled))
        judge, left_out["verifier and similarity"] = _or_reason(lambda: _judge(stages))
    contest = Contest(
        distilled=distilled,
        control=control,
        train=None if real.data is None else real.data.train,
        test=real.test,
        settings=recipe.evaluation,
        view=recipe.relabel.view,
        left_out={row: reason for row, reason in left_out.items() if reason is not None},
    )
    # Students of one protocol on the same test images are found again, whatever their seeds.
    settings = to_dict(replace(recipe, evaluation=replace(recipe.evaluation, seeds=(0,))))["evaluation"]
    key = _digest(json.dumps(settings), real.test.content)
    dataset_id = None if Path(source).is_dir() else source
    facts, tested_on = source_facts(recipe, real.data), scored_on(_tested_recipe(recipe, test))
    keep = Keep(run.folder / f"student-{key}", facts, tested_on, dataset_id)
    verifier = judge if recipe.teachers.verifier else None
    scores = run.work / f"students-{key}"
    evaluation = evaluate_contest(run, contest, scores, verifier=verifier, network=judge, keep=keep)
    report = _report(run, evaluation, source, test)
    if run.accelerator.is_main_process:
        write_json(path, report)
    return DatasetScores(report, path, keep.folder if keep.folder.is_dir() else None)


def _report(run: Run, evaluation: Evaluation, source: str, test: str | None) -> dict[str, Any]:
    if run.recipe.method == "random":
        evaluation = evaluation.of_random_images()
    return {
        "recipe": run.recipe.name,
        "dataset": source,
        "test": test or run.recipe.data.source,
        "evaluation": evaluation.as_dict(),
        "settings": to_dict(run.recipe)["evaluation"],
        "hardware": run.hardware,
        "versions": versions(),
    }
