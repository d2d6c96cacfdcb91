"""Checkpoints: a long job keeps its state every few minutes, and when somebody asks the run to stop.

Everything that the next step depends on: resuming gives the same bytes as never having stopped (on the CPU).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .stop import EVERY_S, raise_if_stopped, stop_wanted
from .store import Artifact
from .tensors import read_tensors, write_tensors


@dataclass(frozen=True)
class State:
    """What a job needs to go on: tensors by name, and plain JSON values."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]


class Checkpoint:
    """The state of one job in a file, whose key says what the job is made from: a state of anything else is not used.

    `every_s` are the seconds between two writes; 0 writes at each call.
    """

    def __init__(self, file: Artifact, every_s: float = EVERY_S) -> None:
        self.file, self.every_s = file, every_s
        self._last, self._pause_s = time.monotonic(), every_s

    def load(self) -> State | None:
        """The last state, or `None` if there is none; a damaged or foreign one is set aside, with a log line."""
        if not self.file.is_whole():
            return None
        return State(read_tensors(self.file.path), self.file.check().notes)

    def tick(self, state: Callable[[], State]) -> None:
        """Call after each step: keeps the state when it is time for it, or before the `StoppedError` of a run that ends."""
        wanted = stop_wanted()  # asked once: a signal between two questions would end the run without its state
        if wanted or time.monotonic() - self._last >= self._pause_s:
            self.save(state())
        if wanted:
            raise_if_stopped()

    def save(self, state: State) -> None:
        """Write a state over the last one."""
        started = time.monotonic()
        write_tensors(self.file, state.tensors, state.notes)
        self._last = time.monotonic()
        if self.every_s:
            # Writing may take 1 % of the time: a slow disk makes checkpoints rarer, up to five times.
            self._pause_s = min(max(self.every_s, 100 * (self._last - started)), 5 * self.every_s)

    def clear(self) -> None:
        """Remove it: the job is finished."""
        self.file.remove()
