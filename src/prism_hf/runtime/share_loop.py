"""The loop over independent tasks: skip finished ones, log the count, split over processes, show progress, wait."""

import heapq
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
from .units import count_text, duration_text

log = logging.getLogger(__name__)
T = TypeVar("T")
ESTIMATE_AFTER_S = 20.0  # a stage that takes longer than this logs an estimate of the time left
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
    cost: Callable[[T], float] | None = None,
    steps: str = "",
    title: str = "",
) -> None:
    """Do all unfinished tasks, divided over the processes. Return on every process when all tasks are done.

    - `tasks` are the same on every process. They are dealt so that the processes finish together; see `deal`.
    - `size` is the number of steps of a task, for the progress. `cost` is its time in any unit, if steps differ in time.
    - `is_done` is called by each process for its share of the tasks; all checks end before any process starts to work.
    - `do` may report its progress in steps; a task that reports nothing is counted when it ends.
    - `prepare` is called on every process with the unfinished tasks, if there are any.
    - `unit` and `steps` name a task and a step, in the singular; by default, a step is a task.
    - `notes` is the folder for progress-RANK.json, which `prism-hf status` reads.
    - `title` precedes the stage on the bar if the run is one of many. No estimate is logged then: they share one.
    """
    missing = unfinished(accelerator, tasks, is_done)
    if accelerator.is_main_process:
        done = f"{len(tasks) - len(missing)} of {count_text(len(tasks), unit)}"
        log.info("%s: %s done, %d to do", stage, done, len(missing))
    if missing:
        prepare(missing)
        hands = deal([(cost or size)(task) for task in missing], accelerator.num_processes)
        mine = [missing[number] for number in hands[accelerator.process_index]]
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


def deal(costs: Sequence[float], world: int) -> list[list[int]]:
    """Divide tasks over processes so that the busiest one has little to do; return the numbers of the tasks of each.

    The longest tasks come first, each to the process with the least work. If that leaves one process with more than 2 %
    above the ideal, tasks are also packed below a limit of work, first fit, with ever better limits. Deterministic.
    """
    order = sorted(range(len(costs)), key=lambda number: -costs[number])
    heap: list[tuple[float, int, int]] = [(0.0, 0, rank) for rank in range(world)]
    hands: list[list[int]] = [[] for _ in range(world)]
    for number in order:
        work, count, rank = heap[0]
        hands[rank].append(number)
        heapq.heapreplace(heap, (work + costs[number], count + 1, rank))  # the count deals out tasks that cost nothing
    low, high = max(sum(costs) / world, max(costs, default=0.0)), max(heap)[0]
    while high > 1.02 * low:
        limit = (low + high) / 2
        packed = _packed(costs, order, world, limit)
        low, high, hands = (limit, high, hands) if packed is None else (low, limit, packed)
    return hands


def _packed(costs: Sequence[float], order: Sequence[int], world: int, limit: float) -> list[list[int]] | None:
    """Put each task on the first process that stays within the limit; `None` if a task fits on no process."""
    work = [0.0] * world
    hands: list[list[int]] = [[] for _ in range(world)]
    for number in order:
        rank = next((rank for rank, value in enumerate(work) if value + costs[number] <= limit), None)
        if rank is None:
            return None
        work[rank] += costs[number]
        hands[rank].append(number)
    return hands


def unfinished(accelerator: Accelerator, tasks: Sequence[T], is_done: Callable[[T], bool]) -> list[T]:
    """Return the unfinished tasks in order, on every process. The checks, which may read whole files, are divided."""
    rank, world = accelerator.process_index, accelerator.num_processes
    missing = [number for number in range(rank, len(tasks), world) if not is_done(tasks[number])]
    return [tasks[number] for number in sorted(gather_object(missing))]


class Progress:
    """The progress of this process in its share of a stage: a progress bar, and a small JSON file for `prism-hf status`.

    A killed process leaves the file behind. With `tell`, one estimate is logged.
    """

    def __init__(self, path: Path, stage: str, total: int, unit: str, title: str = "", *, tell: bool = True) -> None:
        self._path, self._stage, self._total, self._unit, self._tell = path, stage, total, unit, tell
        self._made, self._skipped, self._at_begin, self._task, self._moves = 0, 0, 0, "", False
        self._started, self._written = time.monotonic(), 0.0
        self._bar = tqdm(total=total, desc=f"{title}, {stage}" if title else stage, unit=unit, leave=not title)

    def begin(self, task: str) -> None:
        """Begin a task."""
        self._task, self._at_begin, self._moves = task, self.count, False
        self._write()

    def advance(self, steps: int = 1) -> None:
        """Count steps that were done."""
        self._made += steps
        self._bar.update(steps)
        if self._tell and time.monotonic() - self._started > ESTIMATE_AFTER_S:
            self._tell = False
            log.info("%s: about %s left", self._stage, duration_text(self.seconds_left or 0))
        if time.monotonic() - self._written > _WRITE_EVERY_S:
            self._write()

    def skip(self, steps: int) -> None:
        """Count steps that are not needed or were done by an earlier launch; the speed estimate ignores them."""
        self._skipped += steps
        self._bar.update(steps)
        if steps:
            self._write()

    def reach(self, step: int) -> None:
        """Move to a step of the current task. The first call of a task tells the steps that an earlier launch did."""
        new = step - (self.count - self._at_begin)
        count = self.advance if self._moves else self.skip
        self._moves = True
        count(new)

    def end(self, steps: int) -> None:
        """End a task of `steps` steps, and count those that it did not report."""
        reported = self.count - self._at_begin
        count = self.skip if reported else self.advance
        count(steps - reported)

    def close(self) -> None:
        """End the share: close the bar and remove the file."""
        self._bar.close()
        self._path.unlink(missing_ok=True)

    @property
    def count(self) -> int:
        """Steps so far, including those of earlier tasks and launches."""
        return self._made + self._skipped

    @property
    def seconds_left(self) -> float | None:
        """The estimated time left in seconds, from the speed so far; `None` before the first step."""
        if not self._made:
            return None
        return (time.monotonic() - self._started) / self._made * (self._total - self.count)

    def _write(self) -> None:
        self._written = time.monotonic()
        note = {"stage": self._stage, "unit": self._unit, "done": self.count, "of": self._total, "now": self._task}
        note |= {"seconds_left": self.seconds_left, "updated": time.time()}
        note |= {"host": socket.gethostname(), "pid": os.getpid()}
        with suppress(OutputError):  # only a note: if the disk is full, the next important write reports it
            write_json(self._path, note)
