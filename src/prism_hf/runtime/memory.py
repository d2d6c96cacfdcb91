"""What is said when memory runs out: one line with the batch, and what to change. Nothing shrinks by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import DeviceMemoryError

_CPU_SAYS = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")


@contextmanager
def told_in_one_line(what: str, advice: str) -> Iterator[None]:
    """Turn every way of running out of memory into one error.

    Args:
        what: Who needed it, with the batch: `job 3: a batch of 100 images and teachers a, b`.
        advice: What to change.

    Raises:
        DeviceMemoryError: The device, or the machine, has too little.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError)
        if known or any(words in str(error) for words in _CPU_SAYS):
            raise DeviceMemoryError(f"{what}: out of memory. {advice}") from error
        raise
