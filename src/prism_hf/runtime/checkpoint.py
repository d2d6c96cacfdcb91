"""Checkpoints: a long job saves its state every few minutes, and when the run is asked to stop.

The state holds everything the next step depends on. On the CPU, a resumed job gives the same bytes as an uninterrupted one.
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
    """The state a job needs to resume: tensors by name, and plain JSON values."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]


class Checkpoint:
    """The saved state of one job. The file's key identifies the job's inputs; a state with another key is not used.

    `every_s` is the number of seconds between two writes; 0 writes on every call.
    """

    def __init__(self, file: Artifact, every_s: float = EVERY_S) -> None:
        self.file, self.every_s = file, every_s
        self._last, self._pause_s = time.monotonic(), every_s

    def load(self) -> State | None:
        """Return the last state, or `None` if there is none. A damaged or foreign one is set aside and logged."""
        if not self.file.is_whole():
            return None
        return State(read_tensors(self.file.path), self.file.check().notes)

    def tick(self, state: Callable[[], State]) -> None:
        """Save the state if it is due or the run must stop, then raise `StoppedError` on a stop. Call after each step."""
        wanted = stop_wanted()  # checked once: a signal between two checks would end the run without saving its state
        if wanted or time.monotonic() - self._last >= self._pause_s:
            self.save(state())
        if wanted:
            raise_if_stopped()

    def save(self, state: State) -> None:
        """Write a state, replacing the last one."""
        started = time.monotonic()
        write_tensors(self.file, state.tensors, state.notes)
        self._last = time.monotonic()
        if self.every_s:
            # Writing may take 1 % of the time, so a slow disk makes checkpoints less frequent, by up to a factor of five.
            self._pause_s = min(max(self.every_s, 100 * (self._last - started)), 5 * self.every_s)

    def clear(self) -> None:
        """Remove the checkpoint of a finished job."""
        self.file.remove()
