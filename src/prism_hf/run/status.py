"""The status of a run, from its folder alone: finished, active, failed and remaining work, and the estimated time left."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..dataset import DISTILLED, RANDOM_REAL, VIEWS, view_shards
from ..errors import OutputError, RecipeError
from ..recipe import Recipe, load_recipe, plan_jobs
from ..runtime import count_text, duration_text, holder_of, is_finished, is_held, read_json, size_text
from .artifacts import SQUEEZED, TIMES, job_file, read_failed

_QUIET_S = 600.0
"""Seconds without an update after which the status reports a process as silent."""


def survey(folder: Path) -> dict[str, Any]:
    """Return the state of a run as plain JSON. Reads only file names and small files, and changes nothing.

    Returns:
        `recipe`, `running` (the holder of the folder, or `None`), `stages` (each: `done`, `of`, `unit`, `seconds` spent;
        squeeze: `finished`), `processes` (what each is doing), `failed` jobs with reasons, `checkpoints` (unfinished jobs),
        `aside` (damaged files), `seconds_left` of the running stage, `bytes` on disk.
    """
    try:
        recipe = load_recipe(folder / "recipe.yaml")
    except RecipeError as error:
        raise OutputError(f"{str(folder)!r} does not contain a run ({error}); give the output folder of a run") from error
    work = folder / "work"
    processes = [_read(path) for path in sorted(work.glob("progress-*.json"))]
    running = holder_of(folder) if is_held(folder) else None
    left = [value["seconds_left"] for value in processes if value.get("seconds_left") is not None]
    return {
        "recipe": recipe.name,
        "fingerprint": recipe.fingerprint(),
        "running": running,
        "stages": _stages(recipe, folder),
        "processes": processes if running else [],
        "failed": [{"job": note["job"], "reason": note["reason"]} for note in read_failed(work)],
        "checkpoints": sorted(path.name for path in work.rglob("*.checkpoint*.safetensors")),
        "aside": sorted(path.relative_to(folder).as_posix() for path in work.rglob("*.aside-*") if path.suffix != ".seal"),
        "seconds_left": max(left) if running and left else None,
        "bytes": bytes_below(folder),
    }


def bytes_below(*folders: Path) -> int:
    """Return the total size of all files. Hard links count once. Files of an active run may vanish meanwhile."""
    sizes = {}
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                with suppress(OSError):
                    stat = os.stat(os.path.join(parent, name))
                    sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError):  # its process has just removed it
        return {}
    return value if isinstance(value, dict) else {}


def _stages(recipe: Recipe, folder: Path) -> dict[str, dict[str, object]]:
    work, jobs = folder / "work", plan_jobs(recipe)
    finished = sum(is_finished(job_file(work, job.id)) for job in jobs)
    both = [DISTILLED] if recipe.method == "random" else [DISTILLED, RANDOM_REAL]
    sets = [name for name in both if (work / name).is_dir()] or both
    views = [work / name / VIEWS / shard.name for name in sets for shard in view_shards(recipe, recipe.num_images)]
    students = sum(map(is_finished, (work / "students").glob("*-seed*.json")))
    rows = 2 * len(sets) + bool(recipe.evaluation.full_data_epochs and recipe.data.has_all_images)
    packaged = sum((folder / name / "provenance.json").is_file() for name in ("dataset", "control"))
    count = {
        "synthesize": (finished, len(jobs), "job"),
        "relabel": (sum(map(is_finished, views)), len(views), "view shard"),
        "package": (packaged, len(sets), "folder"),
        "evaluate": (students, rows * len(recipe.evaluation.seeds), "student"),
    }
    seconds, trained = _read(work / TIMES), (work / SQUEEZED).is_file()
    stages: dict[str, dict[str, object]] = {"squeeze": {"finished": trained, "seconds": seconds.get("squeeze")}}
    for name, (done, total, unit) in count.items():
        stages[name] = {"done": done, "of": total, "unit": unit, "seconds": seconds.get(name)}
    return stages


def status_text(state: Mapping[str, Any]) -> str:
    """Format the state of a run for a terminal. The last line is the state as JSON."""
    holder = state["running"]
    who = f"running: process {holder['pid']} on {holder['host']} since {holder['since']}" if holder else "not running"
    lines = [f"{state['recipe']} (fingerprint {state['fingerprint']}), {size_text(state['bytes'])} on disk; {who}"]
    for name, stage in state["stages"].items():
        spent = f"  {duration_text(stage['seconds'])}" if stage["seconds"] else ""
        if "of" in stage:
            left = stage["of"] - stage["done"]
            tail = f", {left} left" if left else ""
            lines.append(f"{name:<11} {stage['done']} of {count_text(stage['of'], stage['unit'])} done{tail}{spent}")
        else:
            unfinished = "started" if stage["seconds"] else "not yet run"
            lines.append(f"{name:<11} {'done' if stage['finished'] else unfinished}{spent}")
    for number, process in enumerate(state["processes"]):
        if process:
            silent = time.time() - process["updated"]
            note = f", no update for {duration_text(silent)}" if silent > _QUIET_S else ""
            steps = f"{process['done']} of {count_text(process['of'], process['unit'])}"
            lines.append(f"process {number:<3} {process['stage']}: {process['now']}, {steps}{note}")
    if state["checkpoints"]:
        lines.append(f"unfinished  {len(state['checkpoints'])} with a checkpoint: {', '.join(state['checkpoints'][:5])}")
    lines += [f"failed      {failed['reason']}" for failed in state["failed"]]
    if state["aside"]:
        lines.append(f"set aside   {', '.join(state['aside'][:5])}")
    if state["seconds_left"] is not None:
        lines.append(f"this stage  about {duration_text(state['seconds_left'])} left")
    return "\n".join([*lines, json.dumps(state, allow_nan=False)])
