"""The stage evaluate: train the students of the table, keep one of them, write report.json, and update the card."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..dataset import DistilledDataset, load_distilled, versions, with_teachers
from ..errors import StageError
from ..evaluation import (
    KEPT,
    LABELS,
    NO_CONTROL,
    NOT_ALL,
    Diversity,
    Source,
    StudentTask,
    epochs_of,
    evaluation_facts,
    is_scored,
    keep_student,
    read_scores,
    remarks_on,
    set_facts,
    student_tasks,
    train_and_score,
)
from ..hub import draw_diversity
from ..images import ImageSplit
from ..models import Teacher, scored_on, source_facts
from ..recipe import NO_IMAGES, plan_jobs, to_dict
from ..runtime import Progress, is_finished, read_proof, write_json
from .artifacts import job_file, read_failed
from .context import Run
from .optimize import term_ratios
from .package import write_card

Keep = Callable[[nn.Module, float], None]


def evaluate(run: Run) -> None:
    """Train and score all students of the table, then write the report and update the card."""
    if not (run.dataset / "README.md").is_file():
        raise StageError(f"{run.dataset} is not packaged yet; run --stage package first")
    # Every process reads the tables. The first one decodes them alone, so that not all processes need the memory at once.
    with run.accelerator.main_process_first():
        distilled = with_labels(run, load_distilled(run.dataset))
        sources: dict[str, Source] = {"distilled": distilled}
        if run.wants_control and run.control.is_dir():
            sources["random_real"] = with_labels(run, load_distilled(run.control))
    if run.recipe.data.has_all_images:
        sources["full"] = run.data.train
    keep = partial(
        keep_student,
        folder=run.folder / "student",
        distilled=distilled,
        settings=run.recipe.evaluation,
        source=source_facts(run.recipe, run.data),
        tested_on=scored_on(run.recipe),
        test_count=len(run.data.test),
    )
    evaluation = fill_table(run, sources, run.data.test, run.work / "students", keep=keep, missing={}, judge=run.judge)
    if run.accelerator.is_main_process:
        conclude(run, evaluation)


def with_labels(run: Run, source: DistilledDataset) -> DistilledDataset:
    """Return the dataset with soft labels: the run's teachers compute them if they are not stored (codec `seed`)."""
    if source.codec != "seed":
        return source
    return with_teachers(source, list(run.teachers(run.recipe.relabel.teachers).values()))


def left_out(run: Run, sources: Mapping[str, Source]) -> dict[str, str]:
    """Return the rows that are not computed, each with the reason."""
    recipe, reasons = run.recipe, {}
    if recipe.data.source == NO_IMAGES:
        why = "the recipe has no real images (data.source: none)"
        return {"random real": why, "all real": why}
    if recipe.method == "random":
        reasons["random real"] = NO_CONTROL
    elif not run.with_control:
        reasons["random real"] = "not yet run: --no-control was given"
    elif "random_real" not in sources:
        reasons["random real"] = "a class has fewer real training images than ipc"
    if recipe.data.images_per_class is not None:
        reasons["all real"] = NOT_ALL
    elif not recipe.evaluation.full_data_epochs:
        reasons["all real"] = "not yet run: the recipe sets evaluation.full_data_epochs to 0"
    return reasons


def fill_table(
    run: Run,
    sources: Mapping[str, Source],
    test: ImageSplit,
    folder: Path,
    *,
    keep: Keep,
    missing: Mapping[str, str],
    judge: Teacher | None,
) -> dict[str, Any]:
    """Train every possible student, score it on `test`, and return the table. The scores are saved in `folder`.

    `judge` is the verifier, or the logit teacher if there is none. `missing` has the reason for each unavailable row.
    """
    recipe, classes = run.recipe, run.recipe.data.num_classes
    protocol, view = recipe.evaluation, recipe.relabel.view
    tasks = student_tasks(sources, test, protocol, view, folder, num_classes=classes) if len(test) else []
    train_students(run, tasks, keep=keep)
    verifier, reasons = judge if recipe.teachers.verifier else None, left_out(run, sources) | dict(missing)
    if not tasks:
        reasons["all students"] = (
            "there are no test images; `prism-hf evaluate DATASET --test DATA:SPLIT` scores them on yours"
        )
    return collect(run, tasks, sources, left_out=reasons, verifier=verifier, network=judge)


def train_students(run: Run, tasks: Sequence[StudentTask], *, keep: Keep | None = None) -> None:
    """Train and score every student that has no score yet, divided over the processes.

    `keep` saves one of them for later use: the student of the distilled images with soft labels and the first seed.
    """

    def do(task: StudentTask, progress: Progress) -> None:
        kept = (task.row, task.seed) == (KEPT, task.settings.seeds[0])
        device, every_s = run.accelerator.device, run.checkpoint_s
        keeper, at_step = keep if kept else None, progress.reach
        train_and_score(task, device=device, keep=keeper, every_s=every_s, at_step=at_step)

    name, size = (lambda task: task.name), (lambda task: task.steps)
    run.share("evaluate", tasks, is_done=is_scored, do=do, unit="student", name=name, size=size, steps="step")


def collect(
    run: Run,
    tasks: Sequence[StudentTask],
    sources: Mapping[str, Source],
    *,
    left_out: Mapping[str, str],
    verifier: Teacher | None,
    network: Teacher | None,
) -> dict[str, Any]:
    """Read all scores, and compute the measures that need no training.

    `sources` has those of `distilled`, `random_real` and `full` that are available. `left_out` has the reason for the
    others. The features of `network` measure similarity.
    """
    distilled, settings = sources["distilled"], run.recipe.evaluation
    assert isinstance(distilled, DistilledDataset)
    classes, device = len(distilled.class_names), run.accelerator.device
    rows, name = read_scores(tasks), verifier.name if verifier else None
    count = len(tasks[0].test) if tasks else 0
    return evaluation_facts(
        rows=rows,
        sets={
            name: set_facts(source, verifier=verifier, network=network, num_classes=classes, device=device)
            for name, source in sources.items()
        },
        student=tasks[0].settings.student if tasks else settings.student,
        epochs=epochs_of(distilled, settings)[0],
        test_count=count,
        verifier=name,
        remarks=remarks_on(run.known_top1, name, rows, classes=classes, count=count),
        similarity_network=network.name if network else None,
        left_out=left_out,
        names={"distilled": LABELS["random_real"]} if run.recipe.method == "random" else None,
        tested_on=run.recipe.data.tested_on,
    )


def conclude(run: Run, evaluation: Mapping[str, Any]) -> None:
    """Write report.json, with all numbers of the table, seeds and settings, and put the numbers into the card."""
    names = LABELS | evaluation.get("names", {})
    sets = {names[name]: Diversity(**facts["intra_class_similarity"]) for name, facts in evaluation["sets"].items()}
    draw_diversity(run.dataset / "assets" / "diversity.png", sets, run.data.class_names)
    files = [job_file(run.work, job.id) for job in plan_jobs(run.recipe)]
    notes = [read_proof(path).notes for path in files if is_finished(path)]
    report = {
        "recipe": run.recipe.name,
        "recipe_fingerprint": run.recipe.fingerprint(),
        "seed": run.recipe.seed,
        "ipc": run.recipe.synthesis.ipc,
        "evaluation": evaluation,
        "teachers_test_top1": run.squeezed_top1,
        "jobs": [{k: note[k] for k in ("job", "logit_top1", "verifier_top1", "precision")} for note in notes],
        "bn_ratios": term_ratios(notes),
        "failed_jobs": [note["job"] for note in read_failed(run.work)],
        "hardware": run.hardware | {"processes": run.accelerator.num_processes},
        "versions": versions(),
        "settings": to_dict(run.recipe),
    }
    write_json(run.folder / "report.json", report)
    write_card(run, run.dataset, report)
