"""Where a run keeps its things, and what belongs to it: the output folder, the processes, progress and trackers.

DIR/recipe.yaml     whose folder this is
DIR/dataset/        the Hub-ready folder
DIR/control/        random real images, packaged the same way
DIR/student/        one student, for timm and transformers
DIR/report.json     every figure of the table
DIR/work/           what the stages leave for each other
DIR/logs/           run.log, trackers
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor

from ..errors import OutputError, RecipeError
from ..method.objective import Precision
from ..recipe.plan import STAGES, TRACKERS
from ..recipe.schema import Recipe, to_dict
from ..recipe.yaml_file import differing_keys, dump_recipe, load_recipe, public_recipe
from ..runtime.lock import HOLDER, LOCK, holder_text, locked
from ..runtime.progress import Board, Progress, progress
from ..runtime.stop import EVERY_S
from ..runtime.store import DRAFT, clear_drafts, restore_swapped, set_aside, write_bytes, write_json

log = logging.getLogger(__name__)
T = TypeVar("T")
PARTS = ("dataset", "control", "student")
"""Folders of a run that people use."""


@dataclass(frozen=True, eq=False)
class Run:
    """One recipe in one output folder, on some processes.

    Attributes:
        recipe: What to do.
        folder: The output folder.
        teachers_root: Where squeezed teachers are kept; recipes may share it.
        accelerator: Processes, device, trackers.
        checkpoint_s: Seconds between two checkpoints of a long job.
        allow_partial: Go on without the jobs whose numbers went bad.
        with_control: Make random real images beside the distilled ones, as every recipe by itself does.
        board: The one bar over many runs, where this is one of them.
    """

    recipe: Recipe
    folder: Path
    teachers_root: Path
    accelerator: Accelerator
    checkpoint_s: float = EVERY_S
    allow_partial: bool = False
    with_control: bool = True
    board: Board | None = None

    @property
    def wants_control(self) -> bool:
        """Whether there is a control to make: a data set of random real images is one itself."""
        return self.with_control and self.recipe.method != "random"

    @property
    def dataset(self) -> Path:
        """The Hub-ready folder."""
        return self.folder / "dataset"

    @property
    def control(self) -> Path:
        """Random real images, packaged the same way."""
        return self.folder / "control"

    @property
    def student(self) -> Path:
        """One student, for timm and transformers."""
        return self.folder / "student"

    @property
    def work(self) -> Path:
        """What the stages leave for each other."""
        return self.folder / "work"

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share."""
        return list(items[self.accelerator.process_index :: self.accelerator.num_processes])

    def not_yet(self, items: Sequence[T], finished: Callable[[T], bool]) -> list[T]:
        """Those of `items` that are not finished, known to every process; each process looks at its share.

        Files are read to the end for that, so the work is divided; and nobody looks while another is already at work.
        """
        places = [(place, item) for place, item in enumerate(items)]
        missing = [place for place, item in self.mine(places) if not finished(item)]
        return [items[place] for place in sorted(gather_object(missing))]

    def progress(self, stage: str, total: int, unit: str) -> AbstractContextManager[Progress]:
        """This process's part of a stage; see `Progress`."""
        path = self.work / f"progress-{self.accelerator.process_index}.json"
        bar = None if self.board is None else self.board.share(stage, total)
        return progress(path, stage, total, unit, self.say, bar)

    def say(self, text: str) -> None:
        """One log line, from the main process only; accelerate's own logger would prefix it with the rank."""
        if self.accelerator.is_main_process:
            log.info(text)

    def warn(self, text: str) -> None:
        """One log line about what went wrong here, from any process."""
        rank = self.accelerator.process_index
        log.warning(f"process {rank}: {text}" if rank else text)

    @property
    def hardware(self) -> dict[str, object]:
        """What a result may depend on beyond the recipe, up to rounding."""
        threads = torch.get_num_threads()
        return {"device": self.accelerator.device.type, "threads": threads, "precision": self.precision}

    @property
    def precision(self) -> Precision:
        """Of the teachers' passes in synthesis, as `accelerate launch --mixed_precision` asks; all else is float32."""
        return "bf16" if self.accelerator.mixed_precision == "bf16" else "float32"

    def times(self) -> dict[str, float]:
        """Seconds spent in each stage so far, all launches added up (those that were killed outright left none)."""
        path = self.work / "times.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of a stage to its record."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.accelerator.is_main_process:
                spent = self.times()
                spent[stage] = round(spent.get(stage, 0.0) + time.perf_counter() - started, 2)
                write_json(self.work / "times.json", {name: spent[name] for name in STAGES if name in spent})


def make_accelerator(folder: Path | None = None, *, log_with: str | None = None, threads: int | None = None) -> Accelerator:
    """The processes of this launch, as `accelerate launch` set them up.

    Args:
        folder: Output folder, for trackers that write files.
        log_with: `tensorboard`, `wandb` or `trackio`.
        threads: CPU threads per process; part of what makes CPU results the same byte for byte.

    Raises:
        RecipeError: The tracker is unknown or not installed, or the precision is neither float32 nor bf16.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise RecipeError(
            f"--mixed_precision {precision} has too narrow a range for BN statistics and losses; use `bf16`, or `no` "
            "for float32"
        )
    if log_with is not None:
        _check_tracker(log_with)
    if threads is not None:
        torch.set_num_threads(threads)
    return Accelerator(
        # Without this flag, processes on a machine without GPU would not know of each other.
        cpu=not torch.cuda.is_available(),
        log_with=log_with,
        project_dir=str(folder / "logs") if folder is not None else None,
        # Processes meet only between stages, and one may have hours more to do than another.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )


def _check_tracker(name: str) -> None:
    from importlib.util import find_spec

    if name not in TRACKERS:
        raise RecipeError(f"--log-with {name!r} is unknown; use one of {', '.join(TRACKERS)}")
    if find_spec(name) is None:
        raise RecipeError(f"--log-with {name}: the package is not installed; pip install {name}")


def check_folder(folder: Path, recipe: Recipe, *, fresh: bool = False) -> None:
    """Find out whether `folder` is, or can become, the output of `recipe`; writes nothing.

    Args:
        folder: The output folder.
        recipe: The recipe.
        fresh: The run in the folder is to be moved aside, whatever its recipe.

    Raises:
        OutputError: It is in use, belongs to another recipe (names the keys that differ), or holds other things.
    """
    check_place(folder, "--output")
    marker = folder / "recipe.yaml"
    if marker.is_file():
        if not fresh:
            _check_recipe(folder, marker, recipe)
        return
    # What a launch leaves that was killed before it had written its recipe.
    ours = (LOCK, HOLDER)
    if folder.is_dir() and any(path.name not in ours and not path.name.startswith(DRAFT) for path in folder.iterdir()):
        raise OutputError(f"output {str(folder)!r} is not empty and holds no run; use another folder (--output DIR)")


def check_place(folder: Path, option: str) -> None:
    """Find out whether `folder` is a folder, or could be one; writes nothing.

    Raises:
        OutputError: It is a file, or no name for a folder; names the option that changes it.
    """
    try:
        is_file = any(place.exists() and not place.is_dir() for place in (folder, *folder.parents))
    except OSError as error:  # a name that is too long
        raise OutputError(
            f"{str(folder)!r} cannot be a folder ({error.strerror}); give another one with {option}"
        ) from error
    if is_file:
        raise OutputError(f"{str(folder)!r} is a file, or below one; give a folder with {option}")


def _check_recipe(folder: Path, marker: Path, recipe: Recipe) -> None:
    try:
        theirs = load_recipe(marker)
    except RecipeError as error:
        raise OutputError(
            f"output {str(folder)!r} holds a recipe that cannot be read ({error}); use --output, or --fresh to move it "
            "aside"
        ) from error
    if theirs.fingerprint() != recipe.fingerprint():
        keys = ", ".join(differing_keys(theirs, recipe))
        raise OutputError(
            f"output {str(folder)!r} belongs to another recipe; these keys differ: {keys}. Use another folder (--output "
            "DIR), or --fresh to move this one aside"
        )


def is_of_another(folder: Path, recipe: Recipe) -> bool:
    """Whether a run of another recipe is in `folder`, or one whose recipe cannot be read."""
    marker = folder / "recipe.yaml"
    if not marker.is_file():
        return False
    try:
        return load_recipe(marker).fingerprint() != recipe.fingerprint()
    except RecipeError:
        return True


@contextmanager
def claimed(folder: Path, recipe: Recipe, *, fresh: bool = False) -> Iterator[str | None]:
    """Make `folder` the output of `recipe`, or find that it is already, and hold it for the length of the block.

    Args:
        folder: The output folder.
        recipe: The recipe.
        fresh: Move a run that is there aside, whatever its recipe; nothing is deleted.

    Yields:
        A line about what an earlier launch left, or `None`.

    Raises:
        OutputError: As `check_folder`; or it cannot be written.
    """
    # Before the lock: a folder that is not ours stays as it is.
    check_folder(folder, recipe, fresh=fresh)
    moved = _moved_aside(folder) if fresh and (folder / "recipe.yaml").is_file() else None
    with locked(folder) as killed:
        check_folder(folder, recipe)
        for name in PARTS:
            restore_swapped(folder / name)
        # Not below DIR/teachers: other runs may be at work there.
        drafts = clear_drafts(folder, deep=False) + sum(clear_drafts(folder / name) for name in ("work", *PARTS))
        if not (folder / "recipe.yaml").is_file():
            write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
        line = f"the old run was moved to {moved}" if moved else None
        if killed is not None:
            line = f"{holder_text(killed)}, ended without a word; going on" + (
                f" ({drafts} drafts removed)" if drafts else ""
            )
        yield line


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Hold the folder of a run that has no recipe of its own; the other processes wait until the first one has it.

    Raises:
        OutputError: Another launch holds it.
    """
    with ExitStack() as stack:
        if run.accelerator.is_main_process:
            stack.enter_context(locked(run.folder))
            clear_drafts(run.folder)
        run.accelerator.wait_for_everyone()
        yield


def _moved_aside(folder: Path) -> Path:
    with locked(folder):
        aside = set_aside(folder)
        # The lock's own files went along; they mean nothing there.
        (aside / HOLDER).unlink(missing_ok=True)
    (aside / LOCK).unlink(missing_ok=True)
    return aside


def start_trackers(run: Run) -> None:
    """Open the trackers, if any, with the recipe's values as their config; local paths stay here."""
    if run.accelerator.log_with:
        flat = {key: _scalar(value) for key, value in _flat(to_dict(public_recipe(run.recipe)), "")}
        run.accelerator.init_trackers("prism-hf", config=flat)


def _flat(values: object, prefix: str) -> Iterator[tuple[str, object]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _scalar(value: object) -> object:
    # TensorBoard's tracker takes nothing but scalars.
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def log_pictures(accelerator: Accelerator, name: str, images_uint8: Tensor, step: int) -> None:
    """Send one picture, (C, H, W) uint8, to every tracker that takes pictures."""
    rgb = images_uint8.expand(3, -1, -1)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: rgb.unsqueeze(0).numpy()}, step=step)
        elif tracker.name == "wandb":
            tracker.log_images({name: [rgb.permute(1, 2, 0).numpy()]}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(rgb.permute(1, 2, 0).numpy())}, step=step)
