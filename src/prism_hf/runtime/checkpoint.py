"""Checkpoints: a long job keeps its state every few minutes, and when somebody asks the run to stop.

Everything that the next step depends on: resuming gives the same bytes as never having stopped (on the CPU).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """The state of an optimizer: tensors as `INDEX.KEY`, parameter groups in the notes."""
    plain = optimizer.state_dict()
    tensors = {f"{index}.{key}": value for index, entry in plain["state"].items() for key, value in entry.items()}
    return State(tensors, {"groups": plain["param_groups"]})


def restore_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Give an optimizer the state that `optimizer_state` read."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in state.tensors.items():
        index, _, key = name.partition(".")
        like = parameters[int(index)]
        # In the parameter's own memory layout: another one may round differently in the last bit.
        same = torch.empty_like(like, dtype=value.dtype).copy_(value) if value.shape == like.shape else value
        entries.setdefault(int(index), {})[key] = same
    optimizer.load_state_dict({"state": entries, "param_groups": state.notes["groups"]})


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names with a prefix: several states in one file."""
    return {f"{prefix}/{key}": value for key, value in tensors.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a prefix again, without it."""
    return {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Global random state, of the CPU and of `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Set what `random_state` read; a state of another kind of device is left out."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
