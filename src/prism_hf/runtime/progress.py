"""How far a stage is, for people (a bar, one estimate in the log) and for machines (DIR/work/progress-RANK.json)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Protocol

from accelerate.utils import tqdm

from ..errors import OutputError
from .store import write_json
from .units import duration_text

ESTIMATE_AFTER_S = 20.0
"""A stage that is not done by then says how long it should take."""
_WRITE_EVERY_S = 5.0


class Bar(Protocol):
    """What shows how much is done."""

    def update(self, count: float) -> object:
        """So much more."""

    def close(self) -> object:
        """No more."""


class Board:
    """One bar over many jobs: teachers, runs, students. A run gives its stages their shares of one unit.

    Args:
        total: Jobs in all.
        say: Prints a log line.
    """

    SHARES: ClassVar[Mapping[str, float]] = {"synthesize": 0.5, "relabel": 0.2, "evaluate": 0.3}
    """Of one run; a guess that only the bar depends on."""
    WHOLE = ("squeeze", "all real")
    """Stages outside of runs, each of whose units is a job."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say, self._began = total, say, time.monotonic()
        self._done = self._before = 0.0
        self._run = ""
        form = "{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total} jobs [{elapsed}]"
        self._bar = tqdm(total=total, desc="compare", bar_format=form)

    def found(self, number: int) -> None:
        """So many more are done already; they say nothing about speed."""
        self.add(number)
        self._before += number

    def begin(self, run: str) -> None:
        """A run, or a stage outside of runs, begins."""
        self._run = run
        self._bar.set_description(run)

    def end(self, number: int) -> None:
        """`number` jobs are done, whatever their stages have told."""
        self.add(number - self._done)
        self._done = float(number)
        made = number - self._before
        if made:
            left = (time.monotonic() - self._began) / made * (self._total - number)
            about = f", about {duration_text(left)} left" if number < self._total else ""
            self._say(f"{self._run}: {number} of {self._total} jobs done{about}")

    def share(self, stage: str, total: int) -> Bar:
        """What a stage of the running run updates; of those in `WHOLE` each unit is a job."""
        self._bar.set_description(f"{self._run}, {stage}")
        return _Share(self, 1.0 if stage in self.WHOLE else self.SHARES.get(stage, 0.0) / max(total, 1))

    def add(self, part: float) -> None:
        """So much more."""
        part = min(part, self._total - self._bar.n)  # shares are rounded, and a bar that is more than full complains
        self._done += part
        self._bar.update(part)

    def close(self) -> None:
        """No more runs."""
        self._bar.close()


class _Share:
    def __init__(self, board: Board, weight: float) -> None:
        self._board, self._weight = board, weight

    def update(self, count: float) -> None:
        self._board.add(count * self._weight)

    def close(self) -> None:
        pass


class Progress:
    """This process's share of a stage.

    Args:
        path: Where it is written for `--status`.
        stage: Name of the stage.
        total: Units of this process's share.
        unit: What is counted.
        say: Prints a log line.
        bar: What shows it, in place of a bar of its own.
    """

    def __init__(
        self, path: Path, stage: str, total: int, unit: str, say: Callable[[str], None], bar: Bar | None = None
    ) -> None:
        self._path, self._stage, self._total, self._unit, self._say = path, stage, total, unit, say
        self._done, self._skipped = 0, 0
        self._started = time.monotonic()
        self._written = 0.0
        self._told = bar is not None  # the bar of many runs tells it
        self._now = ""
        self._bar: Bar = tqdm(total=total, desc=stage, unit=unit) if bar is None else bar

    def skip(self, count: int) -> None:
        """Units that an earlier launch had done; they say nothing about speed."""
        self._skipped += count
        self._bar.update(count)

    def advance(self, count: int = 1) -> None:
        """Units that are done."""
        self._done += count
        self._bar.update(count)
        seconds = time.monotonic() - self._started
        if not self._told and seconds > ESTIMATE_AFTER_S and (left := self.seconds_left()) is not None:
            self._told = True
            self._say(f"{self._stage}: about {duration_text(left)} left")
        if time.monotonic() - self._written > _WRITE_EVERY_S:
            self.write()

    def doing(self, what: str) -> None:
        """What is being done now."""
        self._now = what
        self.write()

    def seconds_left(self) -> float | None:
        """An estimate from the speed so far, or `None` before anything is done."""
        if not self._done:
            return None
        seconds = time.monotonic() - self._started
        return seconds / self._done * (self._total - self._done - self._skipped)

    def write(self) -> None:
        """Leave a note for `--status`."""
        self._written = time.monotonic()
        note = {
            "stage": self._stage,
            "unit": self._unit,
            "done": self._done + self._skipped,
            "of": self._total,
            "now": self._now,
            "seconds_left": self.seconds_left(),
            "updated": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        # Only a note: on a full disk the next file that matters says so.
        with suppress(OutputError):
            write_json(self._path, note)

    def close(self) -> None:
        """End of the share."""
        self._bar.close()
        self._path.unlink(missing_ok=True)


@contextmanager
def progress(
    path: Path, stage: str, total: int, unit: str, say: Callable[[str], None], bar: Bar | None = None
) -> Iterator[Progress]:
    """A `Progress` for the length of the block; what a killed process was doing stays on the disk."""
    shown = Progress(path, stage, total, unit, say, bar)
    try:
        yield shown
    finally:
        shown.close()
