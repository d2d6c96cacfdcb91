"""The log of a run, DIR/logs/run.log: the same lines as on the terminal, with timestamps. Secrets are redacted."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_OURS = "prism_hf"
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|\b(?:api_org_|Bearer\s+)[A-Za-z0-9._-]{8,}|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")
_QUERY = re.compile(r"(?<=\?)[^\s'\"]*(?:Signature|Credential|token)=[^\s'\"]*", re.IGNORECASE)
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")


def blotted(text: str) -> str:
    """Return a text without access tokens, passwords and URL signatures."""
    for name in _SECRETS:
        if len(value := os.environ.get(name, "")) >= 8:
            text = text.replace(value, f"<{name}>")
    return _QUERY.sub("<signature>", _TOKEN.sub("<token>", text))


class _Blotted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return blotted(super().format(record))


class _LogFile(logging.FileHandler):
    """A log file whose failure to write does not end a run: every line is also on the terminal."""

    _told = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # the file cannot be opened
            self.handleError(record)

    def close(self) -> None:
        # Closing retries what could not be written. If that fails too, it is lost.
        with suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self._told:
            self._told = True
            sys.stderr.write(f"{self.baseFilename} cannot be written ({sys.exc_info()[1]}); continuing without it\n")


@contextmanager
def log_file(folder: Path, rank: int) -> Iterator[Path]:
    """Append the package's log lines to DIR/logs/run.log (other processes: run-RANK.log) for the duration of the block."""
    path = folder / "logs" / ("run.log" if rank == 0 else f"run-{rank}.log")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8", delay=True)
    handler.setFormatter(_Blotted("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger(_OURS)
    logger.addHandler(handler)
    try:
        yield path
    except BaseException as error:
        # The error that ends a run is logged too. Only an unexpected one gets a traceback, without variable values.
        expected = type(error).__module__.startswith(_OURS) or not isinstance(error, Exception)
        trace = None if expected else (type(error), error, error.__traceback__)
        handler.emit(logger.makeRecord(_OURS, logging.ERROR, "", 0, "%s: %s", (type(error).__name__, error), trace))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
