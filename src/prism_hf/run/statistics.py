"""Statistics of convolutions over the real data, kept for the next run."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from torch import Tensor

from ..images.source import ImageSplit
from ..method.statistics import BATCH_SIZE, gather_statistics
from ..models.teacher import Teacher
from ..runtime.lock import holder_of, holder_text, is_held, locked
from ..runtime.store import Artifact, clear_drafts, digest
from ..runtime.tensors import read_tensors, write_tensors

log = logging.getLogger(__name__)

FOLDER = "statistics"


def real_statistics(teacher: Teacher, split: ImageSplit, *, root: Path, patch: int, seed: int) -> dict[str, Tensor]:
    """What `gather_statistics` gives for a split of real images, kept below `root / "statistics"` for the next time.

    Another process that gathers the same is waited for, so all get the same bits. A file that is damaged, or was made from
    something else, is set aside with a log line and made again.

    Args:
        teacher: The network.
        split: The real images.
        root: Where teachers and what belongs to them are kept.
        patch: See `patch_statistics`.
        seed: Of the order of the rows.
    """
    facts = {
        "architecture": teacher.architecture,
        "weights_sha256": teacher.weights_sha256,
        "prepared": [teacher.mean, teacher.std, teacher.size],
        "content": f"{split.content}/{split.size}/{split.channels}",
        "count": len(split),
        "image_shape": [split.channels, split.size, split.size],
        "patch": patch,
        "seed": seed,
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
            write_tensors(file, gather_statistics(teacher, split.images, len(split), patch=patch, seed=seed), facts)
        # Copies: what was read is mapped from the file, and would change with it.
        return {name: value.clone() for name, value in read_tensors(file.path).items()}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80] or "unknown"
