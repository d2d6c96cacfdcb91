"""A complete comparison: its runs, executed one after another by all processes together, and its page."""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from accelerate.utils import tqdm

from ..dataset import DistilledDataset, load_distilled
from ..errors import OutputError, SynthesisError
from ..evaluation import StudentTask, label_bytes, plain_table
from ..models import check_network
from ..recipe import cache_needed, plan_jobs
from ..run.artifacts import job_file
from ..run.context import Run, make_accelerator
from ..run.distill import run_stages
from ..run.evaluate import collect, conclude, train_students, with_labels
from ..run.folder import check_place, claimed_together, is_of_another
from ..run.preflight import check, check_data, check_space, missing_space
from ..run.squeeze import squeeze
from ..run.threads import check_threads, use_threads
from ..runtime import DRAFT, HOLDER, LOCK, check_free, clear_drafts, duration_text, locked, log_file, read_proof, unfinished
from .comparison import Comparison, StudentSetup, name_of, task_of
from .findings import findings
from .methods import Method
from .page import table_of, write_page

_OURS = (
    "runs", "cells", "full", "teachers", "work", "logs", "assets", "comparison.html", "comparison.md", "comparison.json",
    LOCK, HOLDER,
)  # fmt: skip


def compare(
    methods: Sequence[Method],
    students: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    teachers_root: Path,
    *,
    threads: int | None,
    checkpoint_s: float,
    notes: Sequence[str],
    command: str,
    teacher_seeds: Sequence[int] = (),
) -> str | None:
    """Run a comparison with soft and hard labels and write its page; the same call resumes an interrupted comparison.

    Returns the table for a terminal, or `None` in all processes but the first. `notes` are those of `under_one_protocol`.
    With `teacher_seeds`, a set of teachers is trained for each, and every seed is run with every set.
    """
    setups = [StudentSetup(student, labels) for student in students for labels in ("soft", "hard")]
    accelerator = make_accelerator()
    places = (folder, teachers_root, accelerator, checkpoint_s)
    comparison = Comparison(methods, setups, seeds, *places, ceilings=students, teacher_seeds=teacher_seeds)
    _check_output(folder)
    check_threads(folder / "work", threads)
    check_comparison(comparison)
    about_data = check_data(comparison.common_run())
    table = None
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(locked(folder))
            # Skip DIR/teachers, because other runs may be using it.
            for name in (".", "cells", "full", "assets", "work"):
                clear_drafts(folder / name, deep=name == "full")
        accelerator.wait_for_everyone()
        stack.enter_context(log_file(folder, accelerator.process_index))
        use_threads(accelerator, folder / "work", threads)
        for line in about_data:
            comparison.common_run().say(line)
        failed = make(comparison)
        if accelerator.is_main_process:
            facts, images = findings(comparison, failed, notes=notes, command=command)
            write_page(folder, facts, images)
            table = plain_table(table_of(facts))
        accelerator.end_training()
    return table


def _check_output(folder: Path) -> None:
    """Refuse an output folder that is in use, or not empty and not a comparison."""
    check_place(folder, "--output")
    ours = not folder.is_dir() or (folder / "runs").is_dir()
    if not ours and any(path.name not in _OURS and not path.name.startswith(DRAFT) for path in folder.iterdir()):
        raise OutputError(f"output {str(folder)!r} is not empty and not a comparison; use another folder (--output DIR)")
    check_free(folder)


def check_comparison(comparison: Comparison) -> None:
    """Check all methods and the disk space before any expensive work starts."""
    data = comparison.protocol.data
    for student in comparison.students:
        check_network(student, num_classes=data.num_classes, channels=data.channels, size=data.size)
    for run in comparison.one_of_each:
        check(comparison.common_run(run), space=False)
    missing = [run for run in comparison.runs if not (comparison.folder / "cells" / f"{name_of(run)}.json").is_file()]
    cached = max((cache_needed(run.recipe, control=run.wants_control) for run in missing), default=0)
    check_space(sum(map(missing_space, missing)), comparison.folder, cached=cached)


def make(comparison: Comparison, part: tuple[int, int] = (1, 1)) -> dict[str, str]:
    """Make all missing teachers, runs and students; return the reason for each run that failed, by its name.

    With `part` (2, 4), make the second of every four runs; other launches make the others.
    """
    common, failed = comparison.common_run(), dict[str, str]()
    teachers: set[tuple[str, int | None]] = set()
    number, count = part
    runs = comparison.runs[number - 1 :: count]
    for run in runs:  # most runs share their teachers, and each teacher is checked once
        wanted = {(name, run.recipe.squeeze.seed) for name in run.recipe.squeezed_teachers}
        if not wanted <= teachers:
            teachers |= wanted
            squeeze(comparison.common_run(run))
    missing = unfinished(comparison.accelerator, runs, comparison.is_made)
    total, finished, began = len(runs), len(runs) - len(missing), time.monotonic()
    common.say(f"compare: {finished} of {total} runs already finished, {len(missing)} to run")
    with tqdm(total=total, initial=finished, desc="compare", unit="run") as bar:
        for made, run in enumerate(missing, 1):
            reason = _make_run(comparison, run)
            if reason is not None:
                failed[name_of(run)] = reason
            bar.update()
            remaining = (time.monotonic() - began) / made * (len(missing) - made)
            estimate = f", about {duration_text(remaining)} left" if remaining else ""
            common.say(f"{run.title}: {finished + made} of {total} runs done{estimate}")
    ceilings = [task for student in comparison.ceilings for task in comparison.full_tasks(student)]
    train_students(common, ceilings[number - 1 :: count])
    return failed


def _make_run(comparison: Comparison, run: Run) -> str | None:
    """Make one run and its record; return the reason if its synthesis failed, or else `None`."""
    began = time.perf_counter()
    # If the recipe has changed since the folder was written, the old contents are moved aside.
    with claimed_together(run, fresh=is_of_another(run.folder, run.recipe)) as line:
        if line is not None:
            run.say(line)
        try:
            run_stages(run, ("synthesize", "relabel", "package"))
        except SynthesisError as error:  # raised in every process
            run.say(f"{name_of(run)}: {error}; the comparison continues without it")
            return str(error)
        with comparison.accelerator.main_process_first():
            distilled = with_labels(run, load_distilled(run.dataset))
        tasks = {setup: task_of(run, distilled, setup) for setup in comparison.setups}
        train_students(run, list(tasks.values()))
        if comparison.accelerator.is_main_process:
            record = _measure(comparison, run, distilled, tasks)
            comparison.record(run).write_json({**record, "wall_time_s": time.perf_counter() - began})  # this launch only
        comparison.accelerator.wait_for_everyone()
    return None


def _measure(
    comparison: Comparison, run: Run, distilled: DistilledDataset, tasks: Mapping[StudentSetup, StudentTask]
) -> dict[str, object]:
    """Write the run's own report and card with the scores of the first student; return the record of the run."""
    reason = "a separate run of the same comparison"
    evaluation = collect(
        run,
        [tasks[setup] for setup in reversed(comparison.plain_setups)],
        {"distilled": distilled},
        left_out={"random real": reason, "all real": reason},
        verifier=run.verifier,
        network=comparison.network,
    )
    conclude(run, evaluation)
    scores = [
        {
            "student": setup.student,
            "labels": setup.key,
            "top1": float(task.score.read_json()["top1"]),
            "label_bytes": label_bytes(distilled, task.settings, setup.labels),
        }
        for setup, task in tasks.items()
    ]
    measured, images, jobs = evaluation["sets"]["distilled"], len(distilled.labels), plan_jobs(run.recipe)
    logit_top1 = [float(read_proof(job_file(run.work, job.id)).notes["logit_top1"]) for job in jobs]
    return {
        "scores": scores,
        "images": images,
        **{key: measured[key] for key in ("image_bytes", "label_bytes", "verifier_top1")},
        "similarity": measured["intra_class_similarity"],
        "seconds_per_image": run.times().get("synthesize", 0.0) / images,
        "steps": sum(job.iterations for job in jobs),
        "image_steps": sum(job.iterations * len(job.classes) for job in jobs),
        "logit_top1": statistics.fmean(logit_top1),
    }
