"""The stages of a run, in order: squeeze, synthesize, relabel, package, evaluate; each takes what the last one left.

Every stage shares its independent jobs over the processes and skips what is finished, so a second launch goes on where
the first one stopped, with any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import tqdm
from torch import Tensor

from .alignment import BNAlignment
from .card import card_facts, render_card, render_control_card
from .data import SourceData, load_source, real_rows
from .errors import DataError, StageError
from .evaluation import Contest, evaluate_contest
from .model_folder import scored_on, source_facts
from .packaging import Epoch, ImageTable, build_dataset, versions, write_provenance
from .pictures import draw_diversity, draw_grid, grid
from .pixels import decode, encode, noise, to_reference
from .plan import STAGES, SynthesisJob, plan_jobs, share_of
from .preflight import check_inputs, check_verifier, inputs_of
from .reading import load_distilled
from .recipe import to_dict
from .recipe_file import public_recipe
from .relabel import label_images, relabel_epoch
from .report import LABELS, Evaluation
from .run import Run, log_pictures
from .squeeze import check_architectures, check_batch, is_squeezed, read_squeezed, squeeze_teacher, teacher_folder
from .storage import read_notes, read_tensors, write_bytes, write_json, write_tensors
from .students import Keep
from .synthesis import synthesize
from .teachers import Teacher, check_teacher, load_teachers
from .training import check_network

SETS = ("distilled", "random_real")


class Stages:
    """The stages of one run; data and teachers are loaded once, when first needed.

    Args:
        run: Recipe, folder and processes.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.recipe = run, run.recipe
        self._public = public_recipe(run.recipe)
        self._data: SourceData | None = None
        self._teachers: dict[str, Teacher] = {}

    def __call__(self, wanted: Sequence[str] = STAGES) -> None:
        """Run the wanted stages, in order."""
        for name in (stage for stage in STAGES if stage in wanted):
            self.run.say(f"stage {name}")
            with self.run.timed(name):
                getattr(self, name)()
                self.run.accelerator.wait_for_everyone()
        self._stamp_times()

    def _stamp_times(self) -> None:
        """Put the times into report.json; only now is that of the last stage known."""
        path = self.run.folder / "report.json"
        if self.run.accelerator.is_main_process and path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, report | {"wall_time_s": self.run.times()})

    @property
    def data(self) -> SourceData:
        """The real data, loaded when first needed.

        No barrier here: a process that needs no data in some stage must not keep the others waiting. Downloads are safe,
        the libraries lock their caches.
        """
        if self._data is None:
            self._data = load_source(self.recipe.data)
        return self._data

    def check(self) -> None:
        """Load what can be wrong before anything costs time: Hub teachers, the data, images per class.

        Raises:
            PrismError: One line about what cannot be used.
        """
        recipe = self.recipe
        data = recipe.data
        check_network(recipe.evaluation.student, num_classes=data.num_classes, channels=data.channels, size=data.size)
        check_architectures(recipe)
        there = [name for name in recipe.all_teachers if name not in recipe.squeezed_teachers]
        loaded = self.teachers(there)
        for name in set(there) & set(recipe.teachers.bn_candidates):
            BNAlignment(loaded[name].model, name=name)
        check_verifier(recipe, loaded)
        check_batch(recipe, self.data)
        if recipe.synthesis.init != "noise":
            assert len(self._initial_rows) == recipe.num_images
        check_inputs(self.run.work / "inputs.json", inputs_of(recipe, self.data, loaded))

    def record_inputs(self) -> None:
        """Keep what the names in the recipe stood for, so that a later launch notices a change behind them."""
        write_json(self.run.work / "inputs.json", inputs_of(self.recipe, self.data, self._teachers))

    def teachers(self, names: Sequence[str]) -> dict[str, Teacher]:
        """Loaded and checked teachers, each once."""
        squeezed = {}
        for name in set(names) & set(self.recipe.squeezed_teachers):
            folder = teacher_folder(name, self.recipe, self.run.teachers_root)
            if not is_squeezed(folder):
                raise StageError(
                    f"teacher {name!r} is not trained yet in {folder.parent}; run recipes/squeeze.py (or --stage squeeze) "
                    "first, or name its folder with --teachers DIR"
                )
            read_squeezed(folder, self.data)
            squeezed[name] = folder
        missing = [name for name in names if name not in self._teachers]
        self._teachers |= load_teachers(missing, device=self.run.accelerator.device, squeezed=squeezed)
        for name in missing:
            check_teacher(self._teachers[name], class_names=self.data.class_names, channels=self.recipe.data.channels)
        return {name: self._teachers[name] for name in names}

    def _verifier(self) -> Teacher | None:
        name = self.recipe.teachers.verifier
        return self.teachers([name])[name] if name else None

    @cached_property
    def _initial_rows(self) -> np.ndarray:
        synthesis = self.recipe.synthesis
        return real_rows(self.data, synthesis.ipc, seed=self.recipe.seed, by_index=synthesis.init == "real_index")

    # -- squeeze ------------------------------------------------------------------------------------------------------

    def squeeze(self) -> None:
        """Train the `squeeze:` teachers that are not there yet."""
        root = self.run.teachers_root
        names = self.recipe.squeezed_teachers
        folders = {name: teacher_folder(name, self.recipe, root) for name in names}
        missing = [name for name in names if not is_squeezed(folders[name])]
        for name in set(names) - set(missing):
            read_squeezed(folders[name], self.data)
        self.run.say(f"squeeze: {len(missing)} of {len(names)} teachers to train, in {root}")
        # Everybody knows what is missing before anybody finishes one.
        self.run.accelerator.wait_for_everyone()
        for name in tqdm(self.run.mine(missing), desc="squeeze"):
            squeeze_teacher(name, self.recipe, self.data, root, device=self.run.accelerator.device)
        self.run.accelerator.wait_for_everyone()
        for name, top1 in self._squeezed_top1().items():
            self.run.say(f"squeeze: {name} scores {100 * top1:.1f} % on the test part")

    def _squeezed_top1(self) -> dict[str, float]:
        result = {}
        for name in self.recipe.squeezed_teachers:
            report = read_squeezed(teacher_folder(name, self.recipe, self.run.teachers_root), self.data)
            result[name] = float(report["test_top1"])  # type: ignore[arg-type]
        return result

    # -- synthesize ---------------------------------------------------------------------------------------------------

    def synthesize(self) -> None:
        """Optimise every job that is not finished."""
        jobs = plan_jobs(self.recipe)
        left = [job for job in jobs if not self._finished(job)]
        self.run.say(f"synthesize: {len(left)} of {len(jobs)} jobs to do")
        self.run.accelerator.wait_for_everyone()
        accelerator = self.run.accelerator
        mine = share_of(left, accelerator.process_index, accelerator.num_processes)
        if left:
            teachers = self.teachers(self.recipe.teachers.synthesis_names)
            verifier = self._verifier()
        with tqdm(total=sum(job.iterations for job in mine), desc="synthesize", unit="step") as bar:
            before = 0
            for job in mine:
                self._one_job(job, teachers, verifier, before, bar.update)
                before += job.iterations

    def _one_job(
        self,
        job: SynthesisJob,
        teachers: dict[str, Teacher],
        verifier: Teacher | None,
        before: int,
        advance: Callable[[int], object],
    ) -> None:
        """Optimise one job and keep it; `before` counts the steps of earlier jobs, since trackers want rising steps."""
        done = 0

        def on_check(entry: dict[str, float]) -> None:
            nonlocal done
            advance(int(entry["step"]) - done)
            done = int(entry["step"])
            values = {f"synthesis/{key}": value for key, value in entry.items() if key != "step"}
            self.run.accelerator.log(values | {"synthesis/job": job.id}, step=before + done)

        initial = self._initial(job).to(self.run.accelerator.device)
        result = synthesize(job, self.recipe.synthesis, initial, teachers, verifier=verifier, on_check=on_check)
        log_pictures(self.run.accelerator, "synthesis/images", grid(result.images_uint8, 1), step=before + done)
        notes = {
            "fingerprint": self._synthesis_fingerprint(),
            "job": job.id,
            "logit_top1": result.logit_top1,
            "verifier_top1": result.verifier_top1,
            "history": result.history,
        }
        write_tensors(self._job_file(job), {"images_uint8": result.images_uint8}, notes)

    def _initial(self, job: SynthesisJob) -> Tensor:
        data = self.recipe.data
        if self.recipe.synthesis.init == "noise":
            generator = torch.Generator().manual_seed(job.seed + 1)
            return noise((len(job.classes), data.channels, data.size, data.size), generator)
        ipc = self.recipe.synthesis.ipc
        rows = [c * ipc + s for c, s in zip(job.classes, job.slots, strict=True)]
        return to_reference(self.data.train.images(self._initial_rows[rows]))

    def _synthesis_fingerprint(self) -> str:
        return self.recipe.fingerprint("data", "teachers", "squeeze", "synthesis")

    def _job_file(self, job: SynthesisJob) -> Path:
        return self.run.work / "jobs" / f"job-{job.id:05d}.safetensors"

    def _finished(self, job: SynthesisJob) -> bool:
        path = self._job_file(job)
        return path.is_file() and read_notes(path).get("fingerprint") == self._synthesis_fingerprint()

    # -- relabel ------------------------------------------------------------------------------------------------------

    def relabel(self) -> None:
        """Encode the images, then label the decoded bytes: the distilled ones, and random real ones as the control."""
        if self.run.accelerator.is_main_process:
            self._encode("distilled", *self._synthesized())
            self._encode_control()
        self._label(SETS)

    def build_control(self) -> None:
        """Only the control: random real images, labelled and packaged, for a data set that was distilled elsewhere.

        Raises:
            PrismError: The real data or the teachers cannot be reached.
        """
        if self.run.accelerator.is_main_process:
            self._encode_control()
        self._label(("random_real",))
        self.run.accelerator.wait_for_everyone()
        if self.run.accelerator.is_main_process:
            self._package_control()
        self.run.accelerator.wait_for_everyone()

    def _encode_control(self) -> None:
        control = self._control_images()
        if control is not None:
            self._encode("random_real", *control)

    def _label(self, names: Sequence[str]) -> None:
        self.run.accelerator.wait_for_everyone()
        sets = [name for name in names if self._encoded_file(name).is_file()]
        epochs = range(self.recipe.relabel.epochs)
        tasks = [(s, e) for s in sets for e in epochs if not self._epoch_file(s, e).is_file()]
        self.run.say(f"relabel: {len(tasks)} of {len(sets) * len(epochs)} epochs of views to label")
        self.run.accelerator.wait_for_everyone()
        teachers = list(self.teachers(self.recipe.relabel.teachers).values())
        device, settings = self.run.accelerator.device, self.recipe.relabel
        images = {name: self._decoded(name).to(device) for name in sets}
        for name, epoch in tqdm(self.run.mine(tasks), desc="relabel"):
            columns = relabel_epoch(epoch, images[name], teachers, settings, seed=self.recipe.seed)
            tensors = {key: torch.from_numpy(value) for key, value in columns.items()}
            write_tensors(self._epoch_file(name, epoch), tensors, {})
        for name in self.run.mine(sets):
            labels = label_images(images[name], teachers, settings)
            write_tensors(self.run.work / name / "teacher_logits.safetensors", {"teacher_logits": labels}, {})

    def _synthesized(self) -> tuple[Tensor, Tensor]:
        """All images, class-major (K * ipc, C, H, W) uint8, and the job of each."""
        jobs, data, ipc = plan_jobs(self.recipe), self.recipe.data, self.recipe.synthesis.ipc
        missing = [job.id for job in jobs if not self._finished(job)]
        if missing:
            raise StageError(f"{len(missing)} of {len(jobs)} synthesis jobs are not finished; run --stage synthesize first")
        images = torch.zeros((data.num_classes * ipc, data.channels, data.size, data.size), dtype=torch.uint8)
        owner = torch.full((len(images),), -1)
        for job in jobs:
            rows = torch.tensor(job.classes) * ipc + torch.tensor(job.slots)
            images[rows] = read_tensors(self._job_file(job))[0]["images_uint8"]
            owner[rows] = job.id
        assert bool((owner >= 0).all())
        return images, owner

    def _control_images(self) -> tuple[Tensor, Tensor] | None:
        try:
            rows = real_rows(self.data, self.recipe.synthesis.ipc, seed=self.recipe.seed)
        except DataError as error:
            # Only with init noise: the check before the run stops every other recipe here.
            self.run.say(f"no random-real control: {error}")
            return None
        return self.data.train.images(rows), torch.full((len(rows),), -1)

    def _encoded_file(self, name: str) -> Path:
        return self.run.work / name / "encoded.safetensors"

    def _epoch_file(self, name: str, epoch: int) -> Path:
        return self.run.work / name / f"epoch-{epoch:05d}.safetensors"

    def _encode(self, name: str, images: Tensor, jobs: Tensor) -> None:
        if self._encoded_file(name).is_file():
            return
        rule = self.recipe.packaging
        blobs = [encode(image, rule.image_format, jpeg_quality=rule.jpeg_quality) for image in images]
        tensors = {f"{i:08d}": torch.frombuffer(bytearray(blob), dtype=torch.uint8) for i, blob in enumerate(blobs)}
        write_tensors(self._encoded_file(name), tensors | {"jobs": jobs}, {})

    def _read_encoded(self, name: str) -> tuple[list[bytes], Tensor]:
        path = self._encoded_file(name)
        if not path.is_file():
            raise StageError(f"{path.name} of the {name} images is missing; run --stage relabel first")
        tensors, _ = read_tensors(path)
        jobs = tensors.pop("jobs")
        return [tensors[key].numpy().tobytes() for key in sorted(tensors)], jobs

    def _decoded(self, name: str) -> Tensor:
        return torch.stack([decode(blob, self.recipe.data.channels) for blob in self._read_encoded(name)[0]])

    # -- package ------------------------------------------------------------------------------------------------------

    def package(self) -> None:
        """Write the data set folder and the control's, each with its provenance; the card says what is not yet run."""
        if not self.run.accelerator.is_main_process:
            return
        before = self._packaged_files()
        self._build("distilled", self.run.dataset)
        self._package_control()
        images = self._decoded("distilled")
        draw_grid(self.run.dataset / "assets" / "grid.png", images, self.data.class_names, self.recipe.synthesis.ipc)
        steps = sum(job.iterations for job in plan_jobs(self.recipe))
        log_pictures(self.run.accelerator, "distilled", grid(images, self.recipe.synthesis.ipc), step=steps)
        # An evaluation stands as long as it is of these very tables.
        same = before is not None and before == self._packaged_files()
        report = self.run.folder / "report.json"
        self._write_card(json.loads(report.read_text(encoding="utf-8")) if same and report.is_file() else None)

    def _packaged_files(self) -> object:
        path = self.run.dataset / "provenance.json"
        return json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else None

    def _package_control(self) -> None:
        if self._encoded_file("random_real").is_file():
            self._build("random_real", self.run.control)
            facts = card_facts(self.run.control, self._public, self.data.class_names, None)
            write_bytes(self.run.control / "README.md", render_control_card(facts, self._public).encode())

    def _build(self, name: str, folder: Path) -> None:
        encoded, jobs = self._read_encoded(name)
        epochs = range(self.recipe.relabel.epochs)
        logits = self.run.work / name / "teacher_logits.safetensors"
        if not logits.is_file() or not all(self._epoch_file(name, e).is_file() for e in epochs):
            raise StageError(f"the {name} images are not all labelled; run --stage relabel first")
        ipc, classes = self.recipe.synthesis.ipc, self.recipe.data.num_classes
        table = ImageTable(
            encoded=encoded,
            labels=torch.arange(classes).repeat_interleave(ipc),
            slots=torch.arange(ipc).repeat(classes),
            jobs=jobs,
            teacher_logits=read_tensors(logits)[0]["teacher_logits"],
        )
        build_dataset(folder, table, self._epochs(name), recipe=self._public, class_names=self.data.class_names)
        loaded = self.teachers(self.recipe.all_teachers)
        write_provenance(
            folder,
            recipe=self._public,
            teachers=dict(zip(self._public.all_teachers, loaded.values(), strict=True)),
            source_revision=self.data.revision,
            source_on_hub=self.data.on_hub,
            hardware=self.run.hardware,
            squeezed_top1=self._squeezed_top1(),
            images=name,
        )

    def _epochs(self, name: str) -> Iterator[Epoch]:
        for epoch in range(self.recipe.relabel.epochs):
            yield {k: v.numpy() for k, v in read_tensors(self._epoch_file(name, epoch))[0].items()}

    def _write_card(self, report: dict[str, object] | None) -> None:
        facts = card_facts(self.run.dataset, self._public, self.data.class_names, report)
        write_bytes(self.run.dataset / "README.md", render_card(facts, self._public).encode())

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Train all students of the table, keep one in DIR/student, write report.json, and complete the card."""
        if not (self.run.dataset / "README.md").is_file():
            raise StageError(f"{self.run.dataset} is not packaged yet; run --stage package first")
        contest = self._contest()
        verifier = self._verifier()
        evaluation = evaluate_contest(
            self.run,
            contest,
            self.run.work / "students",
            verifier=verifier,
            network=verifier or self._logit_teacher(),
            keep=Keep(self.run.student, source_facts(self.recipe, self.data), scored_on(self.recipe)),
        )
        if self.run.accelerator.is_main_process:
            sets = {LABELS[name]: facts.diversity for name, facts in evaluation.sets.items()}
            draw_diversity(self.run.dataset / "assets" / "diversity.png", sets, self.data.class_names)
            report = self.report(evaluation)
            self._write_card(report)
            write_json(self.run.folder / "report.json", report)

    def _logit_teacher(self) -> Teacher:
        name = self.recipe.teachers.logit
        return self.teachers([name])[name]

    def _contest(self) -> Contest:
        left_out = {}
        # Every process opens the tables; the first builds the cache of `datasets`, the others find it.
        with self.run.accelerator.main_process_first():
            distilled = load_distilled(self.run.dataset)
            control = load_distilled(self.run.control) if self.run.control.is_dir() else None
        if control is None:
            left_out["random real"] = "a class has fewer real training images than ipc"
        if not self.recipe.evaluation.full_data_epochs:
            left_out["all real"] = "not yet run: the recipe sets evaluation.full_data_epochs to 0"
        return Contest(
            distilled=distilled,
            control=control,
            train=self.data.train,
            test=self.data.test,
            settings=self.recipe.evaluation,
            view=self.recipe.relabel.view,
            left_out=left_out,
        )

    def report(self, evaluation: Evaluation) -> dict[str, object]:
        """report.json: every figure of the table with its seeds and settings."""
        jobs = [read_notes(self._job_file(job)) for job in plan_jobs(self.recipe)]
        return {
            "recipe": self.recipe.name,
            "recipe_fingerprint": self.recipe.fingerprint(),
            "seed": self.recipe.seed,
            "ipc": self.recipe.synthesis.ipc,
            "evaluation": evaluation.as_dict(),
            "teachers_test_top1": self._squeezed_top1(),
            "jobs": [{k: note[k] for k in ("job", "logit_top1", "verifier_top1")} for note in jobs],
            "hardware": self.run.hardware | {"processes": self.run.accelerator.num_processes},
            "versions": versions(),
            "settings": to_dict(self.recipe),
        }
