"""CPU threads per process: by default all cores of the machine, and the same number in every launch in one folder.

The number of threads determines the order of floating-point sums, so the exact bytes of a CPU result depend on it. Loads
no torch, so that a command can decide how many processes to start.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import joblib

from ..errors import OutputError
from ..runtime import count_text, read_json, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

THREADS = "threads.json"


def check_threads(work: Path, threads: int | None) -> None:
    """Raise an `OutputError` if `threads` differs from the number of earlier launches in this folder. Writes nothing."""
    recorded = recorded_threads(work)
    if threads is not None and recorded is not None and threads != recorded:
        raise OutputError(
            f"--threads is {threads}, but the run in {str(work.parent)!r} was started with "
            f"{count_text(recorded, 'thread')} per process, and its exact bytes depend on that; omit --threads, or use "
            "another folder (--output DIR)"
        )


def recorded_threads(work: Path) -> int | None:
    """Return the threads per process of earlier launches in a folder, or `None` if there were none."""
    return int(read_json(work / THREADS)["threads"]) if (work / THREADS).is_file() else None


def use_threads(accelerator: "Accelerator", work: Path, threads: int | None) -> int:
    """Set and return the threads of this process: the recorded number, else `threads`, else its share of the cores.

    The first launch records the number in `work`. All processes of a launch use the same number.
    """
    check_threads(work, threads)
    if accelerator.is_main_process and recorded_threads(work) is None:
        write_json(work / THREADS, {"threads": threads or default_threads()})
    accelerator.wait_for_everyone()
    recorded = recorded_threads(work)
    assert recorded is not None
    import torch

    torch.set_num_threads(recorded)
    return recorded


def default_threads() -> int:
    """Return the number of cores available to this process, divided by the launch's processes on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun, and so by accelerate launch
    return max(1, joblib.cpu_count() // processes)
