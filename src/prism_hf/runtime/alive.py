"""End the processes of a launch over several machines when one of them is no longer heard of.

A machine that loses power closes no connection, so the others would wait for it in the next barrier for days. Therefore
each process changes a small file in the shared folder, and watches those of the others.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError
from .store import read_json, write_json

BEAT_S = 30.0
SILENCE_S = 900
"""Seconds without a sign of life after which a process counts as gone. A shared disk may show changes a minute late."""
SILENCE = "PRISM_HF_SILENCE_S"
"""Environment variable with another number of seconds."""
EXIT_CODE = 75  # "temporary failure": the same command resumes


@contextlib.contextmanager
def watching(folder: Path, rank: int, world: int) -> Iterator[None]:
    """Watch the other processes during the block, if the launch has several machines. `folder` is shared by all.

    Clocks are not compared: a process is gone if its file has not changed for `SILENCE_S` on the clock of the watcher.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        yield
        return
    text = os.environ.get(SILENCE, str(SILENCE_S))
    if not text.isdecimal() or int(text) < 1:
        raise OutputError(f"{SILENCE} is {text!r}; expected a whole number of seconds, such as 900")
    finished, silence = threading.Event(), float(text)
    thread = threading.Thread(target=_watch, args=(folder, rank, world, silence, finished), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        with contextlib.suppress(OSError):
            _file(folder, rank).unlink(missing_ok=True)


def _watch(folder: Path, rank: int, world: int, silence: float, finished: threading.Event) -> None:
    pause, beat = min(BEAT_S, silence / 5), 0
    seen: dict[int, tuple[object, float]] = {}
    while not finished.wait(pause if beat else 0):
        beat += 1
        with contextlib.suppress(OutputError):  # a full disk is reported by the next important write
            write_json(_file(folder, rank), {"host": socket.gethostname(), "pid": os.getpid(), "beat": beat})
        for other in range(world):
            if other == rank:
                continue
            note = _note(_file(folder, other))
            # Before its first sign of life and after its end, a process has no file.
            if note is None or seen.get(other, (None, 0.0))[0] != note:
                seen[other] = note, time.monotonic()
            elif time.monotonic() - seen[other][1] > silence and not finished.is_set():
                _leave(note, silence)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"alive-{rank}.json"


def _note(path: Path) -> dict[str, object] | None:
    try:
        note = read_json(path)
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _leave(note: dict[str, object], silence: float) -> None:
    """End this process: its main thread may wait in a barrier that only the lost process could end."""
    os.write(
        2,
        f"process {note.get('pid')} on {note.get('host')} gave no sign of life for {silence:g} seconds; this process "
        "ends too; finished work is kept; run the same command again to resume\n".encode(),
    )
    os._exit(EXIT_CODE)
