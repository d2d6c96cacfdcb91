"""The stage package: each dataset folder is completed under a temporary name, then replaces the old one.

The shards of the tables already exist, so they are hard-linked into the folder instead of copied.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..dataset import DISTILLED, RANDOM_REAL, Provenance, check_folder, read_provenance, versions, write_provenance
from ..errors import DamagedError, DataError, StageError
from ..hub import MAX_CLASSES, MAX_SLOTS, card_facts, draw_grid, grid, render_card, render_control_card
from ..recipe import dump_recipe, plan_jobs, public_recipe
from ..runtime import (
    Artifact,
    digest,
    draft_folder,
    files_below,
    read_json,
    read_proof,
    swap_folder,
    unfinished,
    write_bytes,
    writing,
)
from .artifacts import ImageSet, job_file, read_failed
from .context import Run, log_picture
from .relabel import decoded_images, image_sets


def package(run: Run) -> None:
    """Make the folders of the dataset and the control, each with provenance and a card that names what was not run."""
    sets = image_sets(run)
    if unfinished(run.accelerator, run.artifacts.shards(sets), Artifact.is_whole):
        raise StageError("not all images are labeled; run --stage relabel first")
    if run.accelerator.is_main_process:
        for images in sets:
            package_set(run, images)


def package_set(run: Run, images: ImageSet) -> None:
    """Make the dataset folder of one image set, distilled or random real, unless it is up to date."""
    folder = run.dataset if images.name == DISTILLED else run.control
    partial = partial_facts(run, len(images))
    record = _record(run, images, partial)
    if _is_packaged(run, record, folder):
        return
    run.say(f"package: writing {folder}")
    draft = draft_folder(folder)
    try:
        _fill(run, images, draft, partial)
        if images.name == DISTILLED:
            _draw_grid(run, images, draft)
            write_card(run, draft, _kept_report(run, draft))
        else:
            write_card(run, draft, None, render_control_card)
        _keep_foreign(folder, draft)
        provenance = (draft / Provenance.FILE).read_bytes()
        swap_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    record.write_bytes(provenance)


def partial_facts(run: Run, count: int) -> dict[str, object] | None:
    """Return the facts about missing images of failed jobs, for provenance and card; `None` if no image is missing."""
    if count == run.recipe.num_images:
        return None
    return {"images": count, "of": run.recipe.num_images, "failed_jobs": [note["job"] for note in read_failed(run.work)]}


def write_card(run: Run, folder: Path, report: Mapping[str, Any] | None, render: Callable[..., str] = render_card) -> None:
    """Write the card of a dataset folder, with the numbers of an evaluation if there is a report."""
    public = public_recipe(run.recipe)
    facts = card_facts(folder, public, run.data.class_names, report)
    write_bytes(folder / "README.md", render(facts, public).encode())


def _fill(run: Run, images: ImageSet, draft: Path, partial: Mapping[str, object] | None) -> None:
    """Put tables, recipe and provenance into a draft folder."""
    public, teachers = public_recipe(run.recipe), run.teachers(run.recipe.all_teachers)
    for shard in run.artifacts.shards([images]):
        target = draft / shard.path.relative_to(run.work / images.name)
        with writing(target):
            target.parent.mkdir(exist_ok=True)
        try:
            os.link(shard.path, target)
        except OSError:  # the file system does not support hard links
            _copy(shard.path, target)
    write_bytes(draft / "recipe.yaml", dump_recipe(public).encode())
    write_provenance(
        draft,
        recipe=public,
        teachers=dict(zip(public.all_teachers, teachers.values(), strict=True)),
        source_revision=run.data.revision,
        source_on_hub=run.data.on_hub,
        hardware=_hardware(run, images),
        squeezed_top1=run.squeezed_top1,
        images=RANDOM_REAL if run.recipe.method == "random" else images.name,
        partial=partial,
        images_per_class=_images_per_class(run),
    )


def _images_per_class(run: Run) -> list[int]:
    """Return the number of training images of each class; none if there are no real images, or only a part is read."""
    if run.recipe.data.images_per_class is not None:
        return []
    counts = [len(rows) for rows in run.data.train.rows_by_class(run.data.num_classes)]
    return counts if any(counts) else []


def _copy(source: Path, target: Path) -> None:
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _record(run: Run, images: ImageSet, partial: Mapping[str, object] | None) -> Artifact:
    """Return the copy of provenance.json in DIR/work. Its key covers everything that the folder is made from."""
    paths = [shard.path for shard in run.artifacts.shards([images])]
    public = public_recipe(run.recipe)
    facts = [
        {f"{path.parent.name}/{path.name}": read_proof(path).sha256 for path in paths},
        public.fingerprint(),
        public.name,
        list(run.data.class_names),
        _images_per_class(run),
        run.squeezed_top1,
        dict(run.artifacts.weights),
        versions(),
        _hardware(run, images),
        partial,
    ]
    return Artifact(run.work / images.name / Provenance.FILE, digest(facts))


def _is_packaged(run: Run, record: Artifact, folder: Path) -> bool:
    """Return whether a folder is already what packaging would produce now, and log the result."""
    provenance = folder / Provenance.FILE
    if not provenance.is_file():
        return False
    try:
        record.check()
    except DamagedError as error:
        run.say(f"package: {error}; {folder} is packaged again")
        return False
    if record.path.read_bytes() != provenance.read_bytes():
        return False
    differences = check_folder(folder).differences
    for line in differences:
        run.warn(f"{folder}: {line}; it is packaged again")
    if not differences:
        run.say(f"package: {folder} is up to date")
    return not differences


def _hardware(run: Run, images: ImageSet) -> dict[str, object]:
    """Return the hardware of this launch and the precisions of all jobs, which a retry or another launch may have set."""
    jobs = {job for _, _, job, _ in images.origins if job >= 0}
    # Labels are always computed in float32, and the control has no jobs.
    precisions = {str(read_proof(job_file(run.work, job)).notes["precision"]) for job in jobs} or {"float32"}
    return run.hardware | {"precision": " and ".join(sorted(precisions))}


def _draw_grid(run: Run, images: ImageSet, draft: Path) -> None:
    """Draw a grid of the first classes and slots. Missing images are white."""
    data, slots = run.recipe.data, min(run.recipe.synthesis.ipc, MAX_SLOTS)
    classes = min(data.distilled_classes, MAX_CLASSES)
    canvas = torch.full((classes * slots, data.channels, data.size, data.size), 255, dtype=torch.uint8)
    pixels = decoded_images(run, images)
    for row, (label, slot, *_) in enumerate(images.origins):
        if label < classes and slot < slots:
            canvas[label * slots + slot] = pixels[row]
    draw_grid(
        draft / "assets" / "grid.png",
        canvas,
        run.data.class_names[: data.distilled_classes],
        slots,
        ipc=run.recipe.synthesis.ipc,
    )
    steps = sum(job.iterations for job in plan_jobs(run.recipe))
    log_picture(run.accelerator, "distilled", grid(canvas, slots), step=steps)


def _kept_report(run: Run, draft: Path) -> dict[str, Any] | None:
    """Return the report of an earlier evaluation of the same tables, for the card; `None` if there is none."""
    report, figures = run.folder / "report.json", run.dataset / "assets" / "diversity.png"
    if _listed(run.dataset) != _listed(draft) or not report.is_file() or not figures.is_file():
        return None
    _copy(figures, draft / "assets" / "diversity.png")
    return read_json(report)


def _keep_foreign(old: Path, draft: Path) -> None:
    """Copy files that somebody else added to a dataset folder. Only files that prism-hf wrote are replaced."""
    ours = {"README.md", Provenance.FILE, *(_listed(old) or {})}
    for path in files_below(old):
        name = path.relative_to(old).as_posix()
        if name not in ours and not name.startswith(("data/train-", "views/train-", "assets/")):
            _copy(path, draft / name)


def _listed(folder: Path) -> Mapping[str, object] | None:
    """Return the files that provenance.json of a folder lists; `None` if it is missing or invalid."""
    try:
        return read_provenance(folder / Provenance.FILE).files
    except DataError:
        return None
