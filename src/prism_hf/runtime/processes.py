"""Several processes on one machine without a launcher: the first starts the others, with its own command line.

Small networks do not use many threads well. Several processes do better, each with its own images, teachers and students.
"""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import joblib
import psutil

from .stop import STARTED_BY, stop

SMALL = 64
"""Side in pixels up to which images are small: networks of such images gain little from a second thread."""
MOST = 16
"""Most processes that are started without being asked for."""
_BYTES_EACH = 2 * 2**30
"""Free memory that a process should have."""
_GPUS = ("nvidia[0-9]*", "kfd", "dxg")
_WAIT_S = 30.0
_CHECK_S = 0.2


def best_processes(size: int, threads: int | None) -> int:
    """Return how many processes to start for images of `size` pixels: one, or on a CPU one for each `threads` cores.

    `threads` is the number of threads that earlier launches in the folder had, or `None`. Imports no torch.
    """
    if "RANK" in os.environ or size > SMALL or any(any(Path("/dev").glob(name)) for name in _GPUS):
        return 1
    cores = joblib.cpu_count() // (threads or 1)
    return max(1, min(cores, MOST, psutil.virtual_memory().available // _BYTES_EACH))


@contextmanager
def in_processes(count: int) -> Iterator[None]:
    """Run the block in `count` processes: this one, the first, and others that are started with the same command line.

    If another process fails, its messages are shown and this one stops. If this one ends, so do the others.
    """
    if count == 1 or "RANK" in os.environ:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # Accelerate warns if the last one is not set. Each process sets its number of threads itself.
    shared = {key: str(value) for key, value in place.items()} | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    finished, others = threading.Event(), list[tuple[subprocess.Popen[bytes], IO[bytes]]]()
    for rank in range(1, count):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), STARTED_BY: str(os.getpid())}
        said = tempfile.TemporaryFile()
        command = [sys.executable, *sys.orig_argv[1:]]
        others.append((subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=said), said))
    own = shared | {"RANK": "0", "LOCAL_RANK": "0"}
    os.environ.update(own)
    threading.Thread(target=_watch, args=(others, finished), daemon=True).start()
    try:
        yield
        for process, _ in others:
            process.wait(_WAIT_S)
    finally:
        finished.set()
        for key in own:
            os.environ.pop(key, None)


def _watch(others: list[tuple[subprocess.Popen[bytes], IO[bytes]]], finished: threading.Event) -> None:
    """Stop this process if another one fails: it would wait for the other for days."""
    while not finished.wait(_CHECK_S):
        for rank, (process, said) in enumerate(others, 1):
            if not process.poll():
                continue
            if finished.wait(5 * _CHECK_S):  # this process has failed too, most likely for the same reason
                return
            said.seek(0)
            sys.stderr.write(said.read().decode(errors="replace"))
            stop(f"process {rank} has ended", process.returncode if process.returncode > 0 else 1)
            return
