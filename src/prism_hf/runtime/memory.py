"""Running out of memory: one line with the batch, and what to change. Nothing shrinks by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import DeviceMemoryError

_CPU_SAYS = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")


@contextmanager
def told_in_one_line(what: str, advice: str) -> Iterator[None]:
    """Turn every way of running out of memory into one error: `what` needed it, with the batch, and what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if known or any(words in str(error) for words in _CPU_SAYS):
            raise DeviceMemoryError(f"{what}: out of memory. {advice}") from error
        raise
