"""The one loop over independent tasks: skip what is done, say how many, split over processes, show progress, wait."""

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm

from ..errors import OutputError
from .store import write_json
from .units import duration_text

log = logging.getLogger(__name__)
T = TypeVar("T")
ESTIMATE_AFTER_S = 20.0  # a stage that is not done by then says in the log how long it should take
_WRITE_EVERY_S = 5.0


def share(
    accelerator: Accelerator,
    stage: str,
    tasks: Sequence[T],
    *,
    is_done: Callable[[T], bool],
    do: Callable[[T, "Progress"], None],
    unit: str,
    notes: Path,
    prepare: Callable[[list[T]], None] = lambda _: None,
    name: Callable[[T], str] = str,
    size: Callable[[T], int] = lambda _: 1,
    steps: str = "",
    title: str = "",
) -> None:
    """Do every task that is not done, shared over the processes; returns on all of them when all are done.

    - `tasks` are the same on every process; the largest by `size` are done first, so that the processes finish together.
    - `is_done` is asked by each process for its share; nobody looks while another is already at work.
    - `do` may tell its progress in steps; a task that tells nothing counts at its end.
    - `prepare` is called on every process with the tasks that are not done, if there are any.
    - `unit` and `steps` say what a task and a step are, in the singular; by default a step is a task.
    - `notes` is the folder for progress-RANK.json, which `prism-hf status` reads.
    - `title` stands before the stage on the bar, where the run is one of many; those together have one estimate.
    """
    missing = unfinished(accelerator, tasks, is_done)
    if accelerator.is_main_process:
        log.info("%s: %d of %d %ss found, %d to do", stage, len(tasks) - len(missing), len(tasks), unit, len(missing))
    if missing:
        prepare(missing)
        mine = sorted(missing, key=size, reverse=True)[accelerator.process_index :: accelerator.num_processes]
        path, total = notes / f"progress-{accelerator.process_index}.json", sum(map(size, mine))
        progress = Progress(path, stage, total, steps or unit, title, tell=accelerator.is_main_process and not title)
        try:
            for task in mine:
                progress.begin(name(task))
                do(task, progress)
                progress.end(size(task))
        finally:
            progress.close()
    accelerator.wait_for_everyone()


def unfinished(accelerator: Accelerator, tasks: Sequence[T], is_done: Callable[[T], bool]) -> list[T]:
    """The tasks that are not done, in order, known to every process; looking, which may read whole files, is divided."""
    rank, world = accelerator.process_index, accelerator.num_processes
    missing = [number for number in range(rank, len(tasks), world) if not is_done(tasks[number])]
    return [tasks[number] for number in sorted(gather_object(missing))]


class Progress:
    """The progress of this process in its share of a stage: a bar for people, a small JSON file for `prism-hf status`.

    A process that is killed leaves the file behind. `tell` writes one estimate into the log.
    """

    def __init__(self, path: Path, stage: str, total: int, unit: str, title: str = "", *, tell: bool = True) -> None:
        self._path, self._stage, self._total, self._unit, self._tell = path, stage, total, unit, tell
        self._made, self._skipped, self._at_begin, self._task = 0, 0, 0, ""
        self._started, self._written = time.monotonic(), 0.0
        self._bar = tqdm(total=total, desc=f"{title}, {stage}" if title else stage, unit=unit, leave=not title)

    def begin(self, task: str) -> None:
        """A task begins."""
        self._task, self._at_begin = task, self.count
        self._write()

    def advance(self, steps: int = 1) -> None:
        """Steps were made."""
        self._made += steps
        self._bar.update(steps)
        if self._tell and time.monotonic() - self._started > ESTIMATE_AFTER_S:
            self._tell = False
            log.info("%s: about %s left", self._stage, duration_text(self.seconds_left or 0))
        if time.monotonic() - self._written > _WRITE_EVERY_S:
            self._write()

    def skip(self, steps: int) -> None:
        """Steps that need not be made, or were made by an earlier launch: they say nothing about speed."""
        self._skipped += steps
        self._bar.update(steps)

    def end(self, steps: int) -> None:
        """A task of so many steps ends; those that it did not tell are counted now."""
        told = self.count - self._at_begin
        count = self.skip if told else self.advance
        count(steps - told)

    def close(self) -> None:
        """The share ends."""
        self._bar.close()
        self._path.unlink(missing_ok=True)

    @property
    def count(self) -> int:
        """Steps so far, those of earlier tasks and launches included."""
        return self._made + self._skipped

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the speed so far, or `None` before anything was made."""
        if not self._made:
            return None
        return (time.monotonic() - self._started) / self._made * (self._total - self.count)

    def _write(self) -> None:
        self._written = time.monotonic()
        note = {"stage": self._stage, "unit": self._unit, "done": self.count, "of": self._total, "now": self._task}
        note |= {"seconds_left": self.seconds_left, "updated": time.time()}
        note |= {"host": socket.gethostname(), "pid": os.getpid()}
        with suppress(OutputError):  # only a note: on a full disk the next file that matters says so
            write_json(self._path, note)
