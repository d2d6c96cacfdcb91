"""The stage package: the dataset folders are made whole under another name, then take the place of the old ones.

The shards of the tables are written already; they get a second name in the folder, no second copy.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dataset import (
    IMAGES,
    RANDOM_REAL,
    VIEWS,
    FileEntry,
    Provenance,
    check_folder,
    image_shards,
    read_provenance,
    versions,
    view_shards,
    write_provenance,
)
from ..errors import DamagedError, DataError, StageError
from ..hub import MAX_CLASSES, MAX_SLOTS, card_facts, draw_grid, grid, render_card, render_control_card
from ..recipe import dump_recipe, plan_jobs, public_recipe
from ..runtime import (
    Artifact,
    digest,
    draft_folder,
    files_below,
    is_finished,
    read_proof,
    swap_folder,
    write_bytes,
    writing,
)
from .artifacts import ImageSet, read_failed
from .context import Run
from .relabel import are_labelled, decoded_images, image_sets
from .teacher_folders import squeezed_top1
from .trackers import log_pictures


def package(run: Run) -> None:
    """Make the dataset folder and the control's, each with its provenance; the card says what is not yet run.

    Raises:
        StageError: Some images or views are not labelled.
    """
    sets = image_sets(run)
    if not are_labelled(run, sets):
        raise StageError("the images are not all labelled; run --stage relabel first")
    if run.accelerator.is_main_process:
        distilled, *control = sets
        partial = partial_facts(run, len(distilled))
        _package_dataset(run, distilled, partial)
        for images in control:
            package_control(run, images, partial)


def partial_facts(run: Run, count: int) -> dict[str, object] | None:
    """What provenance and card say of a dataset without the images of failed jobs; `None` if all are there."""
    if count == run.recipe.num_images:
        return None
    return {"images": count, "of": run.recipe.num_images, "failed_jobs": [note["job"] for note in read_failed(run.work)]}


def _package_dataset(run: Run, images: ImageSet, partial: Mapping[str, object] | None) -> None:
    """The distilled set; its card keeps the figures of an evaluation of these very tables."""
    folder, report = run.dataset, run.folder / "report.json"
    if _is_packaged(run, images, folder, partial):
        return
    with _draft_of(run, folder) as draft:
        _fill(run, images, draft, partial)
        pixels, slots = _grid_images(run, images), min(run.recipe.synthesis.ipc, MAX_SLOTS)
        draw_grid(draft / "assets" / "grid.png", pixels, run.data.class_names, slots)
        steps = sum(job.iterations for job in plan_jobs(run.recipe))
        log_pictures(run.accelerator, "distilled", grid(pixels, slots), step=steps)
        figures, known = folder / "assets" / "diversity.png", None
        if _listed(folder) == _listed(draft) and report.is_file() and figures.is_file():
            known = json.loads(report.read_text(encoding="utf-8"))
            _copy(figures, draft / "assets" / "diversity.png")
        write_card(run, draft, known)
        _finish(run, images, draft, folder, partial)


def package_control(run: Run, images: ImageSet, partial: Mapping[str, object] | None = None) -> None:
    """Random real images, as a dataset of their own."""
    if _is_packaged(run, images, run.control, partial):
        return
    with _draft_of(run, run.control) as draft:
        _fill(run, images, draft, partial)
        public = public_recipe(run.recipe)
        facts = card_facts(draft, public, run.data.class_names, None)
        write_bytes(draft / "README.md", render_control_card(facts, public).encode())
        _finish(run, images, draft, run.control, partial)


def write_card(run: Run, folder: Path, report: Mapping[str, Any] | None) -> None:
    """Write the card of the distilled set in a folder, with or without the figures of an evaluation."""
    public = public_recipe(run.recipe)
    facts = card_facts(folder, public, run.data.class_names, report)
    write_bytes(folder / "README.md", render_card(facts, public).encode())


@contextmanager
def _draft_of(run: Run, folder: Path) -> Iterator[Path]:
    """A draft of a folder, removed if the block fails."""
    run.say(f"package: writing {folder}")
    draft = draft_folder(folder)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _fill(run: Run, images: ImageSet, draft: Path, partial: Mapping[str, object] | None) -> None:
    """Put tables, recipe and provenance into a draft."""
    public, teachers = public_recipe(run.recipe), run.teachers(run.recipe.all_teachers)
    for table, shards in _shards(run, images).items():
        for shard in shards:
            _link(shard.path, draft / table / shard.path.name)
    write_bytes(draft / "recipe.yaml", dump_recipe(public).encode())
    write_provenance(
        draft,
        recipe=public,
        teachers=dict(zip(public.all_teachers, teachers.values(), strict=True)),
        source_revision=run.data.revision,
        source_on_hub=run.data.on_hub,
        hardware=_hardware(run, images),
        squeezed_top1=squeezed_top1(run.recipe, run.teachers_root, run.data),
        images=RANDOM_REAL if run.recipe.method == "random" else images.name,
        partial=partial,
    )


def _shards(run: Run, images: ImageSet) -> dict[str, list[Artifact]]:
    files, recipe, count = run.artifacts, run.recipe, len(images)
    return {
        IMAGES: [files.image_shard(images, shard) for shard in image_shards(recipe, count)],
        VIEWS: [files.view_shard(images, shard) for shard in view_shards(recipe, count)],
    }


def _link(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has no such thing."""
    with writing(target):
        target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _finish(run: Run, images: ImageSet, draft: Path, folder: Path, partial: Mapping[str, object] | None) -> None:
    _keep_foreign(folder, draft)
    provenance = (draft / "provenance.json").read_bytes()
    swap_folder(draft, folder)
    _record(run, images, partial).write_bytes(provenance)


def _record(run: Run, images: ImageSet, partial: Mapping[str, object] | None) -> Artifact:
    """A copy of provenance.json in DIR/work, with the key of everything that the folder is made from."""
    hashes = {
        f"{table}/{s.path.name}": read_proof(s.path).sha256
        for table, shards in _shards(run, images).items()
        for s in shards
    }
    public = public_recipe(run.recipe)
    facts = [
        public.fingerprint(),
        public.name,
        list(run.data.class_names),
        squeezed_top1(run.recipe, run.teachers_root, run.data),
        dict(run.artifacts.weights),
        versions(),
        _hardware(run, images),
        partial,
    ]
    return Artifact(run.work / images.name / "provenance.json", digest([hashes, *facts]))


def _is_packaged(run: Run, images: ImageSet, folder: Path, partial: Mapping[str, object] | None) -> bool:
    """Whether a folder is what it would be if it were packaged now; the log says so."""
    record, provenance = _record(run, images, partial), folder / "provenance.json"
    if not is_finished(record.path) or not provenance.is_file():
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
        run.say(f"package: {folder} found as it should be")
    return not differences


def _hardware(run: Run, images: ImageSet) -> dict[str, object]:
    """Of this launch, with the precision of the jobs: some may be another launch's, or were made again in float32."""
    jobs = {job for _, _, job, _ in images.origins if job >= 0}
    # Labels are always made in float32, and the control has nothing else.
    precisions = {str(read_proof(run.artifacts.job_path(job)).notes["precision"]) for job in jobs} or {"float32"}
    return run.hardware | {"precision": " and ".join(sorted(precisions))}


def _grid_images(run: Run, images: ImageSet) -> Tensor:
    """The images of the grid: the first classes and slots, white where one is missing."""
    data, ipc = run.recipe.data, min(run.recipe.synthesis.ipc, MAX_SLOTS)
    classes = min(data.num_classes, MAX_CLASSES)
    canvas = torch.full((classes * ipc, data.channels, data.size, data.size), 255, dtype=torch.uint8)
    pixels = decoded_images(run, images)
    for row, (label, slot, *_) in enumerate(images.origins):
        if label < classes and slot < ipc:
            canvas[label * ipc + slot] = pixels[row]
    return canvas


def _keep_foreign(old: Path, draft: Path) -> None:
    """Copy what somebody else has put into a dataset folder; only what we made is replaced."""
    ours = {"README.md", "provenance.json", *(_listed(old) or {})}
    for path in files_below(old):
        name = path.relative_to(old).as_posix()
        if name not in ours and not name.startswith(("data/train-", "views/train-", "assets/")):
            _copy(path, draft / name)


def _listed(folder: Path) -> dict[str, FileEntry] | None:
    """What provenance.json of a folder vouches for; `None` if it says nothing."""
    try:
        return read_provenance(folder / Provenance.FILE).files
    except DataError:
        return None
