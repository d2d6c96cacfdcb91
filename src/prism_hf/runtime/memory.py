"""Out-of-memory errors: one line with the batch and what to change. Nothing is reduced automatically."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DeviceMemoryError

_SAYS = ("out of memory", "DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")


@contextmanager
def told_in_one_line(what: str, advice: str) -> Iterator[None]:
    """Turn any out-of-memory error into a `DeviceMemoryError`: `what` failed (with its batch), and `advice` on the fix."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is matched by name, so that importing this package does not load torch.
        by_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if by_type or any(phrase in str(error) for phrase in _SAYS):
            raise DeviceMemoryError(f"{what}: out of memory. {advice}") from error
        raise
