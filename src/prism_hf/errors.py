"""Errors that a user can fix. Each is reported in one line by the command line.

Every message says what was expected, what came, and how to fix it. Bugs in this package (a broken invariant) are
plain `AssertionError`s and keep their traceback.
"""


class PrismError(Exception):
    """Base class of all errors that the user can fix by changing the recipe, data, folder or environment."""


class RecipeError(PrismError, ValueError):
    """An invalid recipe or override: unknown key, wrong type, or an impossible combination."""


class DataError(PrismError, ValueError):
    """Source data that cannot be used: no image column, too few images, or a corrupt file."""


class TeacherError(PrismError, ValueError):
    """A teacher that cannot be used: not found, no BatchNorm to align, or a different class count or label order."""


class SynthesisError(PrismError, RuntimeError):
    """A failed optimization (non-finite loss, out of memory); finished jobs are kept."""


class NotFiniteError(SynthesisError):
    """A NaN or infinite loss, gradient or pixel in one job; the other jobs continue."""


class DeviceMemoryError(SynthesisError):
    """Too little device or host memory for a batch. The batch size is part of the method, so it is not reduced."""


class StageError(PrismError, FileNotFoundError):
    """A missing output of an earlier stage that this stage needs."""


class OutputError(PrismError, OSError):
    """An output folder that cannot be used: it belongs to another recipe, or is not a run folder."""


class HubError(PrismError, RuntimeError):
    """A failed Hub operation: no token, no permission, a name that is taken, or no answer after several tries.

    Attributes:
        away: True if the Hub gave no usable answer; the same command may work later.
    """

    def __init__(self, message: str, *, away: bool = False) -> None:
        super().__init__(message)
        self.away = away


class DamagedError(PrismError, OSError):
    """A file that was truncated or edited, or that belongs to another run. A run sets it aside and recreates it."""


class StoppedError(PrismError, RuntimeError):
    """A request to stop the program; finished work is kept."""
