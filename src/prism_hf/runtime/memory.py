"""Running out of memory: one line with the batch, and what to change. Nothing shrinks by itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DeviceMemoryError

_SAYS = ("out of memory", "DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")


@contextmanager
def told_in_one_line(what: str, advice: str) -> Iterator[None]:
    """Turn every way of running out of memory into one error: `what` needed it, with the batch, and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError by its name: whoever imports this package need not wait for torch.
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if known or any(words in str(error) for words in _SAYS):
            raise DeviceMemoryError(f"{what}: out of memory. {advice}") from error
        raise
