"""What can go wrong that a user can put right: one line each, caught by the command line.

Every message says what was expected, what came, and how to fix it. Errors of ours (a broken invariant) are
plain `AssertionError`s and keep their traceback.
"""


class PrismError(Exception):
    """Base of every error that a change of recipe, data, folder or environment can put right."""


class RecipeError(PrismError, ValueError):
    """A recipe or an override is wrong: unknown key, wrong type, impossible mix."""


class DataError(PrismError, ValueError):
    """The source data cannot be used: no image column, too few images, a corrupt file."""


class TeacherError(PrismError, ValueError):
    """A teacher cannot teach: not found, no BatchNorm2d to align, another class count or label order."""


class SynthesisError(PrismError, RuntimeError):
    """Optimization went wrong (a loss that is not finite, out of memory); finished jobs are kept."""


class NotFiniteError(SynthesisError):
    """A loss, gradient or pixel of a job is NaN or infinite; the other jobs go on."""


class DeviceMemoryError(SynthesisError):
    """The device, or the machine, has too little memory for a batch; it is part of the method and is not shrunk."""


class StageError(PrismError, FileNotFoundError):
    """A stage needs what an earlier stage leaves, and it is not there."""


class OutputError(PrismError, OSError):
    """The output folder cannot be used: it belongs to another recipe, or is not a run folder."""


class HubError(PrismError, RuntimeError):
    """The Hub cannot be used as asked: no token, no permission, a name that is taken, or no answer after several tries.

    Attributes:
        away: It gives no answer, or none that can be used; the same command may work later.
    """

    def __init__(self, message: str, *, away: bool = False) -> None:
        super().__init__(message)
        self.away = away


class DamagedError(PrismError, OSError):
    """A file is not what was written: truncated, edited, or of another run. A run sets it aside and makes it again."""


class StoppedError(PrismError, RuntimeError):
    """Somebody asked the program to stop; what is finished is kept."""
