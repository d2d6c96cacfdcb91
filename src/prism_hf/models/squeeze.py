"""Squeeze: train teachers on a dataset that has none on the Hub (SRe2L stage 1).

A squeezed teacher is a model folder (see `folder`). Its name contains a fingerprint, so that recipes can share teachers.
"""

import hashlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import DamagedError, TeacherError
from ..images import ImageSplit, SourceData, draw_views, reference_mean_std, resample, to_reference
from ..recipe import SQUEEZE_PREFIX, Recipe, SqueezeRecipe, without_folders
from ..runtime import (
    EVERY_S,
    Artifact,
    Checkpoint,
    clear_drafts,
    derived_seed,
    is_held,
    raise_if_stopped,
    to_device,
    waited_for,
)
from .build import operations, seeded
from .facts import SqueezeSettings, TeacherFacts
from .folder import is_stored, scored_on, source_facts, store_network
from .start import architecture_of, input_size_of, start_facts, untrained_teacher
from .teacher import Teacher, digest_of_tensors
from .training import AtStep, ShuffledBatches, fit, score


def teacher_folder(name: str, recipe: Recipe, root: Path) -> Path:
    """Return the folder of a `squeeze:` teacher, named by architecture and a fingerprint of data, settings and seed."""
    start = name.removeprefix(SQUEEZE_PREFIX)
    # Recipes with different seeds share teachers if their seed for squeezing is the same.
    shared = replace(recipe, seed=_seed(recipe), squeeze=replace(recipe.squeeze, seed=None))
    text = f"{start}/{shared.fingerprint('data', 'squeeze')}"
    short = re.sub(r"\W+", "-", start.rstrip("/").rpartition("/")[2]).strip("-")
    return root / f"{short}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _seed(recipe: Recipe) -> int:
    return recipe.seed if recipe.squeeze.seed is None else recipe.squeeze.seed


def is_squeezed(folder: Path) -> bool:
    """Return whether a folder contains a finished teacher; folders are renamed into place as a whole."""
    return is_stored(folder, TeacherFacts.FILE)


def read_squeezed(folder: Path, data: SourceData | None = None) -> TeacherFacts:
    """Return squeeze.json of a finished teacher; if `data` is given, the teacher must have been trained on it.

    Raises:
        TeacherError: The teacher was trained on other images: the source now has other content under the same name.
        DamagedError: squeeze.json is not readable.
    """
    try:
        facts = TeacherFacts.read(folder / TeacherFacts.FILE)
    except ValueError as error:
        raise DamagedError(f"{error}; move the folder away to train the teacher again") from error
    if data is not None and facts.train_content != data.train.content:
        raise TeacherError(
            f"the teacher in {folder} was trained on other images than the source has now; move it away, or use another "
            "folder (--teachers DIR)"
        )
    return facts


def check_squeezed(folder: Path) -> Path:
    """Verify the weights of a finished teacher against the digest in squeeze.json, and return the folder.

    Raises:
        DamagedError: The weights were truncated, edited or replaced.
    """
    expected, path = read_squeezed(folder).weights_sha256, folder / "model.safetensors"
    try:
        actual = digest_of_tensors(load_file(path))
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path} is not readable ({type(error).__name__})") from error
    if expected is not None and actual != expected:  # earlier versions did not store a digest
        raise DamagedError(f"{path} was changed after it was written")
    return folder


def check_batch(recipe: Recipe, data: SourceData) -> None:
    """Raise a `TeacherError` with both numbers, before any training, if there are fewer images than one batch."""
    size, count = recipe.squeeze.batch_size, len(data.train)
    if recipe.squeezed_teachers and count < size:
        raise TeacherError(f"squeeze.batch_size is {size}, but there are {count} training images; lower it")


def squeeze_steps(recipe: Recipe, data: SourceData) -> int:
    """Return the number of training steps of a squeezed teacher."""
    return recipe.squeeze.epochs * (len(data.train) // recipe.squeeze.batch_size)


def squeeze_operations(recipe: Recipe, name: str) -> int:
    """Return the operations of a squeezed teacher for one image. All take the same steps, but not the same time."""
    size = input_size_of(name, recipe)
    return operations(architecture_of(name), num_classes=recipe.data.num_classes, channels=3, size=size)


def squeeze_teacher(
    name: str,
    recipe: Recipe,
    data: SourceData,
    root: Path,
    *,
    device: torch.device,
    every_s: float = EVERY_S,
    at_step: AtStep = lambda _: None,
) -> TeacherFacts:
    """Train a `squeeze:` teacher and store it below `root`, with a checkpoint every `every_s` seconds. See `fit`.

    A finished teacher is kept. If another run is training the teacher, this call waits for it.

    Raises:
        StoppedError: The program was asked to stop; the next run resumes the training from its checkpoint.
    """
    folder = teacher_folder(name, recipe, root)
    work = _scratch(folder)
    check_batch(recipe, data)
    with waited_for(work, f"squeeze: {name} is being trained"):
        if is_squeezed(folder):
            return read_squeezed(folder, data)
        clear_drafts(root, of=folder.name, deep=False)
        checkpoint = Checkpoint(Artifact(work / "checkpoint.safetensors", f"{folder.name} {data.train.content}"), every_s)
        facts = _train_and_store(name, recipe, data, folder, checkpoint, device, at_step)
    shutil.rmtree(work, ignore_errors=True)
    return facts


def _scratch(folder: Path) -> Path:
    """Return the working folder of a teacher during its training."""
    return folder.with_name(f".work-{folder.name}")


def clear_scratch(folder: Path) -> None:
    """Remove the working folder of a finished teacher, left behind if a process was killed right after storing it."""
    scratch = _scratch(folder)
    if scratch.is_dir() and not is_held(scratch):
        shutil.rmtree(scratch, ignore_errors=True)


def _train_and_store(
    name: str,
    recipe: Recipe,
    data: SourceData,
    folder: Path,
    checkpoint: Checkpoint,
    device: torch.device,
    at_step: AtStep,
) -> TeacherFacts:
    start, started, settings = name.removeprefix(SQUEEZE_PREFIX), time.perf_counter(), recipe.squeeze
    seed, steps, source = _seed(recipe), squeeze_steps(recipe, data), source_facts(recipe, data)
    derived = derived_seed(seed, "squeeze", start)
    with seeded(derived, device):
        teacher = untrained_teacher(name, recipe)
        teacher.model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network = fit(
            teacher.model,
            _batches(data.train, settings, derived, teacher),
            F.cross_entropy,
            steps=steps,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            schedule="one_cycle",
            what=f"squeeze: teacher {start}",
            checkpoint=checkpoint,
            at_step=at_step,
        )
        if settings.bn_statistics == "clean":
            clean = replace(settings, noise_std=0.0, epochs=1)
            _measure_again(network, (images for images, _ in _batches(data.train, clean, derived, teacher)))
    facts = TeacherFacts(
        kind="teacher",
        teacher=without_folders(name),
        architecture=teacher.architecture,
        start=start_facts(name),
        train_content=data.train.content,
        train_count=len(data.train),
        test_count=len(data.test),
        channels=recipe.data.channels,
        source=source,
        test=scored_on(recipe),
        settings=SqueezeSettings(seed=seed, data=source.id, steps=steps, epochs=settings.epochs),
        fingerprint=folder.name.rpartition("-")[2],
        test_top1=score(lambda x: network(teacher.prepare(x)), data.test, device=device),
        weights_sha256=digest_of_tensors(network.state_dict()),
        wall_time_s=round(time.perf_counter() - started, 2),
    )
    mean_std = (teacher.mean, teacher.std)
    store_network(network, folder, facts, size=teacher.size, class_names=data.class_names, mean_std=mean_std)
    return facts


@torch.no_grad()
def _measure_again(network: nn.Module, batches: Iterator[Tensor]) -> None:
    """Replace the running statistics of every batch norm by their averages over `batches`; nothing else changes.

    Like `torch.optim.swa_utils.update_bn`, but without dropout: synthesis compares with statistics of the eval mode.
    """
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    for images in batches:
        raise_if_stopped()
        network(images.contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def _batches(split: ImageSplit, settings: SqueezeRecipe, seed: int, teacher: Teacher) -> ShuffledBatches:
    labels, device = torch.from_numpy(split.labels), teacher.device
    size, count = settings.batch_size, len(split)

    def make(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = to_reference(to_device(split.images(rows), device))
        view = draw_views(len(rows), images.shape[-1], generator, crop_scale=settings.crop_scale, flip=settings.flip)
        images = resample(images, view.crop, view.flip)
        _, std = reference_mean_std(images.shape[1], like=images)
        # Drawn on the CPU, so that the numbers are the same on any device.
        strength = settings.noise_std * to_device(torch.rand((len(rows), 1, 1, 1), generator=generator), device) / std
        images = images + strength * to_device(torch.randn(images.shape, generator=generator), device)
        return teacher.prepare(images), to_device(labels[rows], device)

    # Only full batches, because BatchNorm learns its statistics from them.
    parts = [range(start, start + size) for start in range(0, count - size + 1, size)]
    return ShuffledBatches(parts, settings.epochs, torch.Generator().manual_seed(seed), make, count=count)
