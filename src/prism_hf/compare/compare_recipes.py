"""A whole comparison by one call: check everything, claim the folder, make the runs, write the page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..images import count_classes
from ..recipe import Recipe, override_recipe
from ..run.context import make_accelerator
from ..runtime import EVERY_S, check_free, clear_drafts, locked, log_file
from .findings import write_page
from .methods import Method, StudentSetup
from .runs import Comparison, check_comparison, check_comparison_folder, make


def with_data(first: Recipe, source: str, overrides: Sequence[str]) -> list[str]:
    """Overrides that give all recipes other data; columns, revision and classes of the first recipe's do not hold there.

    Args:
        first: The recipe whose other settings of the data are kept.
        source: A Hub id, or a folder.
        overrides: Of the user; columns and splits among them are used to count the classes.
    """
    words = [f"data.{key}=null" for key in ("config", "revision", "image_column", "label_column")]
    words += ["data.licence=unknown", f"data.source={json.dumps(source)}"]
    # The rest of the overrides waits for the number of classes.
    data = override_recipe(first, [*words, *(word for word in overrides if word.startswith("data."))]).data
    # The section as a whole: the other recipes may name splits or columns that these data do not have.
    section = dataclasses.asdict(data) | {"num_classes": count_classes(data)}
    return [f"data={json.dumps(section, ensure_ascii=False)}", *overrides]


def compare_recipes(
    methods: Sequence[Method],
    setups: Sequence[StudentSetup],
    seeds: Sequence[int],
    folder: Path,
    *,
    teachers: Path,
    notes: Sequence[str],
    command: str,
    threads: int | None = None,
    checkpoint_s: float = EVERY_S,
) -> dict[str, Any] | None:
    """Make the runs of a comparison and its page; the same call resumes an interrupted one.

    Args:
        methods: From `under_one_protocol`.
        setups: Students and their labels.
        seeds: One run of each method.
        folder: Output folder.
        teachers: Where squeezed teachers are kept.
        notes: From `under_one_protocol`, for the page.
        command: The words that make the comparison again, for the page.
        threads: CPU threads per process.
        checkpoint_s: Seconds between two checkpoints of a long job.

    Returns:
        The comparison as comparison.json has it; `None` in every process but the first.
    """
    check_comparison_folder(folder)
    check_free(folder)
    accelerator = make_accelerator(threads=threads)
    comparison = Comparison(
        methods,
        setups,
        seeds,
        folder=folder,
        teachers_root=teachers,
        accelerator=accelerator,
        checkpoint_s=checkpoint_s,
    )
    check_comparison(comparison)
    result = None
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(locked(folder))
            # Not below DIR/teachers: other runs may be at work there.
            for name in (".", "cells", "full", "assets", "work"):
                clear_drafts(folder / name, deep=name == "full")
        accelerator.wait_for_everyone()
        stack.enter_context(log_file(folder, accelerator.process_index))
        failed = make(comparison)
        if accelerator.is_main_process:
            result = write_page(comparison, failed, notes=notes, command=command)
        accelerator.end_training()
    return result
