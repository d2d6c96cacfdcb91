"""A complete run in one call: check everything, claim the folder, run the stages in order, publish.

Every stage divides its independent tasks over the processes and skips finished ones. So a second launch resumes where
the first one stopped, with any number of processes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..errors import HubError, RecipeError
from ..evaluation import summary
from ..hub import Target, bundle_of, check_here, check_target, publish, reserve
from ..method import Compile
from ..recipe import STAGES, Overrides, Recipe, flat_values, load_recipe, override_recipe, public_recipe
from ..runtime import EVERY_S, check_free, count_text, log_file, raise_if_stopped, read_json, watching, write_json
from .context import Run, make_accelerator
from .evaluate import evaluate
from .folder import check_folder, claimed_together
from .merge import check_folders
from .merge import merge as take_over
from .package import package
from .preflight import check, check_data, check_stage, record_inputs
from .relabel import relabel
from .squeeze import squeeze
from .synthesize import synthesize
from .threads import check_threads, use_threads

_FUNCTIONS = dict(zip(STAGES, (squeeze, synthesize, relabel, package, evaluate), strict=True))


@dataclass(frozen=True)
class Distilled:
    """The results of a run.

    Attributes:
        dataset: The dataset folder inside the output folder; `None` if it is not packaged yet.
        report: The content of report.json, with all numbers of the table; `None` if the run is not evaluated yet.
        url: URL of the commit or pull request, if the dataset was published; only in the main process.
    """

    folder: Path
    dataset: Path | None
    report: dict[str, Any] | None
    url: str | None

    @property
    def table(self) -> str | None:
        """The results table and summary that the command line prints; `None` if the run is not evaluated yet."""
        return None if self.report is None else summary(self.report)


def distill(
    recipe: Recipe | Path | str,
    output: Path | str,
    overrides: Overrides = (),
    *,
    teachers: Path | str | None = None,
    stage: str | None = None,
    fresh: bool = False,
    allow_partial: bool = False,
    control: bool = True,
    part: tuple[int, int] | None = None,
    merge: Sequence[Path | str] = (),
    push_to_hub: Target | str | None = None,
    log_with: str | None = None,
    threads: int | None = None,
    compile: Compile = "auto",
    checkpoint_s: float = EVERY_S,
) -> Distilled:
    """Distill a dataset into a folder, as `prism-hf distill` does; the same call resumes an interrupted run.

    Args:
        recipe: A recipe, the path of a YAML file, or the name of a shipped recipe (`digits/prism_ipc10`).
        output: The output folder.
        overrides: Changes to the recipe: `{"synthesis.ipc": 5}`, or `["synthesis.ipc=5"]`.
        teachers: Folder of squeezed teachers, which recipes can share; default: OUTPUT/teachers.
        stage: Run only this stage: `squeeze`, `synthesize`, `relabel`, `package` or `evaluate`.
        fresh: Move an existing run in the folder aside, and start again.
        allow_partial: Package the finished images even if some jobs failed.
        part: `(2, 3)` does the second third of the jobs or views of a stage, `synthesize` or `relabel`; see docs/scale.md.
        merge: Other output folders of the same recipe, whose finished images and labels are taken over first.
        control: Also make random real images, label them and train students on them, as the control of the distilled ones.
        push_to_hub: Publish the dataset in one commit; a plain Hub id: to a private repo.
        log_with: Log losses and images to `tensorboard`, `wandb` or `trackio`.
        threads: CPU threads per process, on which exact bytes depend; default: as before, or cores / processes.
        compile: How the passes of the teachers are sped up: `auto`, `on` or `off`; see `prism_hf.synthesize`.
        checkpoint_s: Seconds between checkpoints of a long job.

    Raises:
        PrismError: One line, about invalid input before anything is written, or about a later failure.

    Example:
        >>> print(distill("digits/prism_ipc10", "outputs/digits", overrides={"synthesis.ipc": 1}).table)
    """
    recipe = override_recipe(recipe, overrides) if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    target, folder = Target(push_to_hub) if isinstance(push_to_hub, str) else push_to_hub, Path(output)
    _check_at_once(recipe, folder, stage, target, compile, fresh=fresh, part=part)
    check_threads(folder / "work", None if fresh else threads)
    accelerator, root = make_accelerator(folder, log_with=log_with), Path(teachers or folder / "teachers")
    run = Run(recipe, folder, root, accelerator, checkpoint_s, allow_partial, control, part, compile)
    return _distill(run, stage, target, threads, list(map(Path, merge)), fresh=fresh)


def _check_at_once(
    recipe: Recipe,
    folder: Path,
    stage: str | None,
    target: Target | None,
    compile: str,
    *,
    fresh: bool,
    part: tuple[int, int] | None,
) -> None:
    """Check everything that needs neither data nor teachers."""
    if part is not None and not 1 <= part[0] <= part[1]:
        raise RecipeError(f"part {part[0]}/{part[1]} does not exist; expected 1/N to N/N")
    if part is not None and stage not in ("synthesize", "relabel"):
        raise RecipeError("--part divides images and labels; add --stage synthesize, or --stage relabel with --merge")
    if stage is not None and stage not in STAGES:
        raise RecipeError(f"stage {stage!r} is unknown; use one of {', '.join(STAGES)}")
    if compile not in ("auto", "on", "off"):
        raise RecipeError(f"compile is {compile!r}; use auto, on or off")
    if target is not None and stage in ("squeeze", "synthesize", "relabel"):
        raise HubError(f"--stage {stage} does not make a dataset to push; omit --stage, or push after --stage package")
    check_folder(folder, recipe, fresh=fresh)
    check_free(folder)
    if target is not None:
        check_here(target)


def _distill(
    run: Run, stage: str | None, target: Target | None, threads: int | None, others: Sequence[Path], *, fresh: bool
) -> Distilled:
    """Check everything that can fail later, claim the folder, run the stages, publish."""
    is_main, recipe, processes = run.accelerator.is_main_process, run.recipe, run.accelerator.num_processes
    target = check_target(target, recipe.name) if target is not None and is_main else None
    if stage is not None:
        check_stage(run, stage, fresh=fresh)
    check_folders(run, others)
    check(run, fresh=fresh)
    notes = check_data(run)
    # Nothing is written before this point.
    if target is not None:
        reserve(target)
    with claimed_together(run, fresh=fresh) as earlier, log_file(run.folder, run.accelerator.process_index):
        if is_main:
            record_inputs(run)
        threads = use_threads(run.accelerator, run.work, threads)
        where = (
            f"in {run.folder}, {count_text(processes, 'process', 'processes')} with {count_text(threads, 'thread')} each"
        )
        run.say(f"{recipe.name} (fingerprint {recipe.fingerprint()}) {where}")
        for line in [*([] if earlier is None else [earlier]), *notes]:
            run.say(line)
        start_trackers(run.accelerator, recipe)
        with watching(run.work, run.accelerator.process_index, processes):
            if others:
                take_over(run, others)
            run_stages(run, STAGES if stage is None else [stage])
        path = run.folder / "report.json"
        report = read_json(path) if path.is_file() else None
        run.accelerator.end_training()
        try:
            url = None if target is None else publish(bundle_of(run.dataset), target).url
        except HubError:
            if report is not None:
                run.say(summary(report))  # the caller gets an error instead of a result with the table
            raise
    return Distilled(run.folder, run.dataset if run.dataset.is_dir() else None, report, url)


def run_stages(run: Run, wanted: Sequence[str]) -> None:
    """Run the wanted stages in order, and record how long each one took."""
    for name in (stage for stage in STAGES if stage in wanted):
        run.say(f"stage {name}")
        with run.timed(name):
            _FUNCTIONS[name](run)
            run.accelerator.wait_for_everyone()
        raise_if_stopped()
    report = run.folder / "report.json"
    if run.accelerator.is_main_process and report.is_file():
        # The time of the last stage is known only now.
        write_json(report, read_json(report) | {"wall_time_s": run.times()})


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Start the trackers, if any, with the recipe's values, but no local paths, as their config."""
    if accelerator.log_with:
        # TensorBoard's tracker accepts only scalars.
        config = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in flat_values(public_recipe(recipe)).items()
        }
        accelerator.init_trackers("prism-hf", config=config)
