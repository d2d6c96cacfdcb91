"""Statistics of convolutions over the real data, kept for the next run."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from torch import Tensor

from ..images import ImageSplit
from ..method import BATCH_SIZE, gather_statistics, shuffled_batches
from ..models import Teacher
from ..runtime import Artifact, clear_drafts, digest, holder_of, holder_text, is_held, locked, told_in_one_line
from ..runtime.tensors import read_tensors, write_tensors

log = logging.getLogger(__name__)

FOLDER = "statistics"
SEED = 0
"""Of the order in which batches are drawn from the real images."""


def real_statistics(teacher: Teacher, split: ImageSplit, *, root: Path, patch: int) -> dict[str, Tensor]:
    """Return what `gather_statistics` gives for all images of a split, kept below `root / "statistics"`.

    Another process that gathers the same is waited for, so all get the same bits. A file that is damaged, or was made from
    something else, is set aside with a log line and made again.

    Args:
        teacher: The network.
        split: The real images.
        root: Where teachers and what belongs to them are kept.
        patch: See `patch_statistics`.

    Raises:
        TeacherError: The network runs no convolution.
        DeviceMemoryError: A batch does not fit.
        StoppedError: Somebody asked the program to stop.
    """
    facts = {
        "architecture": teacher.architecture,
        "weights_sha256": teacher.weights_sha256,
        "prepared": [teacher.mean, teacher.std, teacher.size],
        "content": f"{split.content}/{split.size}/{split.channels}",
        "count": len(split),
        "image_shape": [split.channels, split.size, split.size],
        "patch": patch,
        "seed": SEED,
        "batch_size": BATCH_SIZE,
    }
    key = digest(facts)
    folder = root / FOLDER / f"{_slug(teacher.architecture)}-{key[:12]}"
    file = Artifact(folder / "conv.safetensors", key)
    if is_held(folder):
        log.info("%s is being gathered by %s; waiting for it", file.path, holder_text(holder_of(folder)))
    with locked(folder, patience_s=-1):
        clear_drafts(folder)
        if not file.is_whole():
            log.info("teacher %s: statistics of convolutions over %d real images", teacher.name, len(split))
            batch = f"a batch of {min(BATCH_SIZE, len(split))} real images for statistics of convolutions"
            with told_in_one_line(f"teacher {teacher.name!r}: {batch}", "Use a device with more memory"):
                averages = gather_statistics(teacher, shuffled_batches(split.images, len(split), seed=SEED), patch=patch)
            write_tensors(file, averages, facts)
        # Copies: what was read is mapped from the file, and would change with it.
        return {name: value.clone() for name, value in read_tensors(file.path).items()}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80] or "unknown"
