"""Facts about the machine that a benchmark runs on."""

import os
import platform
from pathlib import Path

from prism_hf.dataset.provenance import versions


def cpu() -> str:
    """Return the name of the processor, as far as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def hardware() -> dict[str, object]:
    """Return the name of the processor and its number of cores."""
    return {"cpu": cpu(), "cores": os.cpu_count()}


def facts() -> dict[str, object]:
    """Return the hardware and the package versions."""
    return {"hardware": hardware(), "versions": versions()}
