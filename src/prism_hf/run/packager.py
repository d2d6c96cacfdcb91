"""The stage package: a folder is made whole under another name, then takes the place of the old one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dataset.provenance import FileEntry, read_provenance, versions, write_provenance
from ..dataset.verify import check_folder
from ..dataset.writer import build_dataset
from ..errors import DamagedError, DataError, StageError
from ..hub.dataset_card import card_facts, render_card, render_control_card
from ..hub.figures import MAX_CLASSES, MAX_SLOTS, draw_grid, grid
from ..recipe.plan import SynthesisJob, plan_jobs
from ..runtime.store import (
    digest,
    draft_folder,
    files_below,
    is_sealed,
    read_record,
    read_seal,
    sha256_of,
    swap_folder,
    write_bytes,
    write_record,
)
from .artifacts import DISTILLED, RANDOM_REAL, StoredImages, read_failed
from .context import log_pictures
from .session import Session


class Packager:
    """Makes the data set folders of a run from what the stages before left.

    Args:
        session: The run.
        partial: What is missing from a partial data set, for provenance and card; `None` if it is complete.
    """

    def __init__(self, session: Session, partial: Mapping[str, object] | None = None) -> None:
        self._session, self._run, self._recipe, self._work = session, session.run, session.recipe, session.work
        self._public, self._partial = session.public, partial

    def dataset(self) -> None:
        """The distilled set; its card keeps the figures of an evaluation of these very tables."""
        folder, report = self._run.dataset, self._run.folder / "report.json"
        before = _tables(folder)
        draft = self._build(DISTILLED, folder)
        if draft is not None:
            (draft / "assets").mkdir(exist_ok=True)
            shown = self._shown()
            slots = min(self._recipe.synthesis.ipc, MAX_SLOTS)
            draw_grid(draft / "assets" / "grid.png", shown, self._session.data.class_names, slots)
            steps = sum(job.iterations for job in plan_jobs(self._recipe))
            log_pictures(self._run.accelerator, "distilled", grid(shown, slots), step=steps)
            figures = folder / "assets" / "diversity.png"
            known = None
            if before is not None and before == _tables(draft) and report.is_file() and figures.is_file():
                known = json.loads(report.read_text(encoding="utf-8"))
                shutil.copyfile(figures, draft / "assets" / "diversity.png")
            self.write_card(draft, known)
            self._finish(DISTILLED, draft, folder)

    def control(self) -> None:
        """Random real images, where there are any."""
        if not is_sealed(self._work.set_file(RANDOM_REAL, "pixels.npy")):
            return
        draft = self._build(RANDOM_REAL, self._run.control)
        if draft is not None:
            facts = card_facts(draft, self._public, self._session.data.class_names, None)
            write_bytes(draft / "README.md", render_control_card(facts, self._public).encode())
            self._finish(RANDOM_REAL, draft, self._run.control)

    def write_card(self, folder: Path, report: Mapping[str, Any] | None) -> None:
        """The card of the distilled set in `folder`, with or without the figures of an evaluation."""
        facts = card_facts(folder, self._public, self._session.data.class_names, report)
        write_bytes(folder / "README.md", render_card(facts, self._public).encode())

    def _build(self, name: str, folder: Path) -> Path | None:
        """A draft of a folder with tables and provenance, or `None` if `folder` is what it would be."""
        key = self._key(name)
        if self._is_packaged(name, key, folder):
            self._run.say(f"package: {folder} found as it should be")
            return None
        self._run.say(f"package: writing {folder}")
        images, epochs = StoredImages(self._work, name), self._work.epochs(name)
        teachers = self._session.teachers(self._recipe.all_teachers)
        draft = draft_folder(folder)
        try:
            build_dataset(draft, images, epochs, recipe=self._public, class_names=self._session.data.class_names)
            write_provenance(
                draft,
                recipe=self._public,
                teachers=dict(zip(self._public.all_teachers, teachers.values(), strict=True)),
                source_revision=self._session.data.revision,
                source_on_hub=self._session.data.on_hub,
                hardware=self._hardware(name),
                squeezed_top1=self._session.squeezed_top1(),
                images=RANDOM_REAL if self._recipe.method == "random" else name,
                partial=self._partial,
            )
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return draft

    def _finish(self, name: str, draft: Path, folder: Path) -> None:
        provenance = sha256_of(draft / "provenance.json")
        _keep_foreign(folder, draft)
        swap_folder(draft, folder)
        write_record(self._record(name), {"key": self._key(name), "provenance": provenance})

    def _record(self, name: str) -> Path:
        return self._work.folder / name / "packaged.json"

    def _is_packaged(self, name: str, key: str, folder: Path) -> bool:
        if not self._record(name).is_file() or not (folder / "provenance.json").is_file():
            return False
        try:
            record = read_record(self._record(name))
        except DamagedError as error:
            self._run.warn(f"{error}; {folder} is packaged again")
            return False
        if record != {"key": key, "provenance": sha256_of(folder / "provenance.json")}:
            return False
        differences = check_folder(folder).differences
        for line in differences:
            self._run.warn(f"{folder}: {line}; it is packaged again")
        return not differences

    def _key(self, name: str) -> str:
        """Everything that the folder is made from."""
        files = ["encoded.bin", "rows.npy", "teacher_logits.npy"]
        files += [self._work.epoch_file(name, epoch).name for epoch in range(self._recipe.relabel.epochs)]
        missing = [file for file in files if not is_sealed(self._work.set_file(name, file))]
        if missing:
            raise StageError(f"the {name} images are not all labelled; run --stage relabel first")
        seals = [read_seal(self._work.set_file(name, file))["file_sha256"] for file in files]
        facts = (
            self._public.fingerprint(),
            self._public.name,
            self._session.data.class_names,
            self._session.squeezed_top1(),
        )
        return digest([seals, *facts, self._work.weights, versions(), self._hardware(name), self._partial])

    def _hardware(self, name: str) -> dict[str, object]:
        """Of this launch, with the precision of the jobs: some may be another launch's, or were made again in float32."""
        jobs = [job for job in plan_jobs(self._recipe) if is_sealed(self._work.job_file(job))] if name == DISTILLED else []
        # Labels are always made in float32, and the control has nothing else.
        found = {str(self._work.job_notes(job)["precision"]) for job in jobs} or {"float32"}
        return self._run.hardware | {"precision": " and ".join(sorted(found))}

    def _shown(self) -> Tensor:
        """The images of the grid: the first classes and slots, white where one is missing."""
        data, ipc = self._recipe.data, min(self._recipe.synthesis.ipc, MAX_SLOTS)
        classes = min(data.num_classes, MAX_CLASSES)
        canvas = torch.full((classes * ipc, data.channels, data.size, data.size), 255, dtype=torch.uint8)
        pixels = self._work.pixels(DISTILLED)
        for row, (label, slot) in enumerate(self._work.places(DISTILLED)):
            if label < classes and slot < ipc:
                canvas[label * ipc + slot] = pixels[row]
        return canvas


def _keep_foreign(old: Path, draft: Path) -> None:
    """Copy what somebody else has put into a data set folder; only what we made is replaced."""
    ours = {"README.md", "provenance.json", *(_tables(old) or {})}
    for path in files_below(old):
        name = path.relative_to(old).as_posix()
        if name not in ours and not name.startswith(("data/train-", "views/train-", "assets/")):
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, draft / name)


def partial_facts(session: Session, jobs: Sequence[SynthesisJob]) -> dict[str, object] | None:
    """What provenance and card say of a data set without the images of failed jobs; `None` if all are there."""
    count = sum(len(job.classes) for job in jobs)
    if count == session.recipe.num_images:
        return None
    failed = [note["job"] for note in read_failed(session.run.work)]
    return {"images": count, "of": session.recipe.num_images, "failed_jobs": failed}


def _tables(folder: Path) -> dict[str, FileEntry] | None:
    """What provenance.json of a folder vouches for; `None` if it says nothing."""
    try:
        return read_provenance(folder / "provenance.json").files
    except DataError:
        return None
