"""What a figure was measured on."""

import os
import platform
from pathlib import Path

from prism_hf.dataset.provenance import versions


def cpu() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def hardware() -> dict[str, object]:
    """The processor and its cores."""
    return {"cpu": cpu(), "cores": os.cpu_count()}


def facts() -> dict[str, object]:
    """Hardware and versions."""
    return {"hardware": hardware(), "versions": versions()}
