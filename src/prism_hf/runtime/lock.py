"""Folder locks: one launch per folder at a time. The operating system releases the lock when the process ends or dies."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import OutputError
from .stop import is_first_process
from .store import clear_drafts, read_json, write_json, writing

log = logging.getLogger(__name__)
LOCK, HOLDER = ".lock", ".holder.json"
PATIENCE_S = 6.0  # wait for a launch that is about to end: people press Ctrl-C and start again


@contextmanager
def locked(folder: Path, *, patience_s: float = PATIENCE_S) -> Iterator[dict[str, object] | None]:
    """Hold the lock of a folder for the duration of the block. Create the folder if it is missing.

    Yields:
        The last holder if it was killed before it released the folder, else `None`.

    Raises:
        OutputError: Another launch still holds the folder after `patience_s`. The message names its host and process.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=patience_s)
        except Timeout as error:
            raise _in_use(folder) from error
    try:
        killed, since = holder_of(folder), datetime.now(UTC).isoformat(timespec="seconds")
        write_json(folder / HOLDER, {"host": socket.gethostname(), "pid": os.getpid(), "since": since})
        yield killed
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


@contextmanager
def waited_for(folder: Path, what: str) -> Iterator[None]:
    """Wait for the lock of a folder (logging `what` its holder does), clear its drafts, and hold the lock for the block."""
    if is_held(folder):
        log.info("%s by %s; waiting for it", what, holder_text(holder_of(folder)))
    with locked(folder, patience_s=-1):
        clear_drafts(folder)
        yield


def check_free(folder: Path, *, patience_s: float = PATIENCE_S) -> None:
    """Raise an `OutputError` if a folder is in use, before anything is loaded. Changes nothing.

    Only the first process checks: by the time the others do, it may already hold the folder.
    """
    if is_first_process() and is_held(folder, patience_s=patience_s):
        raise _in_use(folder)


def _in_use(folder: Path) -> OutputError:
    holder = holder_text(holder_of(folder))
    remedy = "wait for it, stop it, or use another folder (--output DIR)"
    return OutputError(f"output {str(folder)!r} is in use by {holder}; {remedy}")


def holder_of(folder: Path) -> dict[str, object] | None:
    """Return the holder of a folder, or the last one if it was killed; `None` if none is recorded."""
    try:
        value = read_json(folder / HOLDER)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_held(folder: Path, *, patience_s: float = 0) -> bool:
    """Return whether a launch holds a folder and still holds it after `patience_s`. Changes nothing."""
    if not (folder / LOCK).is_file():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=patience_s)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def holder_text(holder: dict[str, object] | None) -> str:
    """Return `process 123 on HOST, since TIME`."""
    if holder is None:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
