"""How good a data set is: students trained from scratch on it, scored on real test images, beside their controls.

Legend: B images, C channels, H W pixels, K classes.

The controls answer the field's criticism (arXiv 2604.18811, 2502.06434): random real images under the very same
relabelling and protocol, hard labels only, and the full training set. Last epoch, several seeds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dataset import DistilledDataset
from ..errors import DataError, RecipeError
from ..images import ImageSplit, draw_views, resample, to_reference
from ..method import class_shares, soft_label_loss
from ..models import (
    Batches,
    DistilledFacts,
    ScoredOn,
    ShuffledBatches,
    SourceFacts,
    StudentFacts,
    build_network,
    fit,
    seeded,
    store_network,
)
from ..recipe import EvaluationRecipe, RelabelView, batch_ranges
from ..runtime import derived_seed
from ..runtime.checkpoint import Checkpoint

log = logging.getLogger(__name__)
Labels = Literal["soft", "hard", "image"]

_ON_DEVICE = 2**25
"""Bytes of uint8 images that are put on the device once; of a larger set each batch comes from the mapped file."""
_WINDOW = 2**22
"""Bytes of views and logits that are read at once, but at least those of a batch."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        images: `distilled`, `random_real` or `full`.
        labels: `soft` (stored logits of the views), `hard` (the class, mixed as the view mixes) or `image` (stored logits
            of the image without a view, mixed as the view mixes: one label per image, whatever the epochs).
    """

    images: Literal["distilled", "random_real", "full"]
    labels: Labels

    @property
    def key(self) -> str:
        """Name in files and reports."""
        return f"{self.images}-{self.labels}"


ROWS = (
    Row("distilled", "soft"),
    Row("random_real", "soft"),
    Row("distilled", "hard"),
    Row("random_real", "hard"),
    Row("full", "hard"),
)
"""The rows of the table unless others are asked for."""
KEPT = Row("distilled", "soft")
"""The row whose first student is kept for others to use."""


def train_student(
    source: DistilledDataset,
    settings: EvaluationRecipe,
    *,
    labels: Labels,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
) -> nn.Module:
    """Train one student on what a data set folder contains: images, labels, views; nothing else.

    Args:
        source: The distilled (or control) data set.
        settings: Architecture, loss, optimiser.
        labels: `soft`: the stored logits of the views; `image`: those of the images, mixed as the view mixes; `hard`: plain
            CE on the classes. Views, batches and steps are the same.
        seed: Of the weights; the order of images comes from the views.
        device: Where to train.
        checkpoint: Where its state is kept now and then, and where its training goes on if there is one.

    Returns:
        The student in eval mode, on `device`, taking the reference normalisation.

    Raises:
        DataError: The folder holds fewer epochs of views than `settings.label_epochs`, or else `settings.epochs`.

    Example:
        >>> student = train_student(load_distilled(folder), recipe.evaluation, labels="soft", seed=0, device=device)
    """
    epochs, recorded = settings.epochs or source.num_epochs, recorded_epochs(source, settings)
    count, classes = len(source.images_uint8), len(source.class_names)
    steps = epochs * len(batch_ranges(count, settings.batch_size))

    def loss(logits: Tensor, teacher_logits: Tensor, shares: Tensor) -> Tensor:
        if labels == "hard":
            return F.cross_entropy(logits, shares)
        return soft_label_loss(logits, teacher_logits, shares, settings)

    batches = Batches(
        lambda start: _view_batches(
            source, epochs, settings.batch_size, device, start, recorded=recorded, per_image=labels == "image"
        )
    )
    with seeded(seed, device):
        network = _student(settings, classes, source.images_uint8.shape[1], device)
        return _fit(network, batches, loss, steps, settings, f"student {settings.student}, seed {seed}", checkpoint)


def recorded_epochs(source: DistilledDataset, settings: EvaluationRecipe) -> int:
    """How many recorded epochs of views the training takes in turn.

    Raises:
        DataError: The data set holds fewer.
    """
    wanted = settings.label_epochs or settings.epochs or source.num_epochs
    if wanted > source.num_epochs:
        key = "label_epochs" if settings.label_epochs else "epochs"
        raise DataError(f"the data set holds {source.num_epochs} epochs of views, evaluation.{key} is {wanted}; lower it")
    return wanted


def label_bytes(source: DistilledDataset, settings: EvaluationRecipe, labels: Labels) -> int | None:
    """Bytes of stored labels that a student reads; `None` for a dataset that is not in files.

    `soft`: views and logits of the epochs that it reads; `image`: one row of logits per image; `hard`: none.
    """
    if labels == "hard":
        return 0
    if labels == "image":
        return source.image_label_bytes
    return source.label_bytes_of(min(recorded_epochs(source, settings), settings.epochs or source.num_epochs))


def train_on_real(
    split: ImageSplit,
    settings: EvaluationRecipe,
    view: RelabelView,
    *,
    num_classes: int,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
) -> nn.Module:
    """The ceiling: the same student, optimiser and crops on all real training images, hard labels, no mixing."""
    steps = settings.full_data_epochs * len(batch_ranges(len(split), settings.batch_size))
    batches = _real_batches(split, settings, view, seed, device)
    with seeded(seed, device):
        network = _student(settings, num_classes, split.channels, device)
        what = f"student {settings.student} on all real images, seed {seed}"
        return _fit(network, batches, F.cross_entropy, steps, settings, what, checkpoint)


def _student(settings: EvaluationRecipe, num_classes: int, channels: int, device: torch.device) -> nn.Module:
    network = build_network(settings.student, num_classes=num_classes, channels=channels).to(device)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _fit(
    network: nn.Module,
    batches: Batches,
    loss: Callable[..., Tensor],
    steps: int,
    settings: EvaluationRecipe,
    what: str,
    checkpoint: Checkpoint | None,
) -> nn.Module:
    rate, decay, ema = settings.lr, settings.weight_decay, settings.ema
    return fit(network, batches, loss, steps=steps, lr=rate, weight_decay=decay, ema=ema, what=what, checkpoint=checkpoint)


def _view_batches(
    source: DistilledDataset,
    epochs: int,
    batch_size: int,
    device: torch.device,
    start: int = 0,
    *,
    recorded: int | None = None,
    per_image: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views, logits and class shares of each batch; the first `start` batches are passed over, no image of them is read.

    Args:
        source: The data set.
        epochs: Epochs of the training.
        batch_size: Views per batch.
        device: Where the batches go.
        start: Batches that are done.
        recorded: The training takes the first so many recorded epochs in turn; by default it has as many.
        per_image: Logits of the images, mixed as the view mixes, instead of those of the views.
    """
    images, recorded = source.images_uint8, recorded or epochs
    if images.nbytes <= _ON_DEVICE:
        images = images.to(device)
    parts = batch_ranges(len(source.labels), batch_size)
    at_once = max(1, _WINDOW // (batch_size * (2 * len(source.class_names) + 256)))  # 256: a view, roughly
    first, skip = divmod(start, len(parts))
    for epoch in range(first, epochs):
        left = parts[skip:] if epoch == first else parts
        for window in (left[i : i + at_once] for i in range(0, len(left), at_once)):
            begin = window[0].start
            rows, logits = source.views(epoch % recorded, range(begin, window[-1].stop))
            for part in window:
                cut = rows[part.start - begin : part.stop - begin]
                stored = logits[part.start - begin : part.stop - begin]
                partner, weight = cut.view.mix_with.clamp(min=0), cut.view.mix_weight
                if per_image:
                    stored = _mixed_logits(source.teacher_logits, cut.image_index, partner, weight)
                shares = class_shares(
                    source.labels[cut.image_index], source.labels[partner], weight, len(source.class_names)
                )
                yield (
                    cut.replay(images, lambda picked: to_reference(picked.to(device))),
                    stored.to(device, torch.float32),
                    shares.to(device),
                )


def _mixed_logits(logits: Tensor, image: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    """Logits of images, (N, K), at (B,) images and partners -> (B, K) float32; only their rows are read."""
    own, other = logits[image].float(), logits[partner].float()
    return torch.lerp(other, own, weight.view(-1, 1))


def _real_batches(
    split: ImageSplit, settings: EvaluationRecipe, view: RelabelView, seed: int, device: torch.device
) -> ShuffledBatches:
    labels = torch.from_numpy(split.labels)

    def make(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = draw_views(len(rows), split.size, generator, crop_scale=view.crop_scale, flip=view.flip)
        images = to_reference(split.images(rows).to(device))
        return resample(images, drawn.crop, drawn.flip), labels[rows].to(device)

    generator = torch.Generator().manual_seed(derived_seed(seed, "full data"))
    parts = batch_ranges(len(split), settings.batch_size)
    return ShuffledBatches(parts, settings.full_data_epochs, generator, make, count=len(split))


def keep_student(
    student: nn.Module,
    distilled: DistilledDataset,
    settings: EvaluationRecipe,
    folder: Path,
    *,
    source: SourceFacts,
    tested_on: ScoredOn,
    dataset_id: str | None,
    seed: int,
    top1: float,
    test_count: int,
) -> None:
    """Store a student of row `KEPT` as a model folder; one that cannot be stored (not of timm) is left, with a log line.

    Args:
        student: From `train_student` with soft labels.
        distilled: What it was trained on.
        settings: How.
        folder: Where to; see `store_network`.
        source: The real data behind the distilled set, from `source_facts`.
        tested_on: The test part, from `scored_on`.
        dataset_id: Hub id of the distilled set, or `None` if it is a local folder.
        seed: Of the student.
        top1: Its score, in [0, 1].
        test_count: On how many images.
    """
    _, channels, _, size = distilled.images_uint8.shape
    facts = _student_facts(distilled, settings, source, tested_on, dataset_id, seed=seed, top1=top1, test_count=test_count)
    try:
        store_network(
            student,
            folder,
            facts,
            architecture=settings.student,
            size=size,
            channels=channels,
            class_names=distilled.class_names,
            licence=source.licence,
            replace=True,  # one that is there belongs to a score that is gone, or to other seeds
        )
    except RecipeError as error:
        log.info("student not kept: %s", error)


def _student_facts(
    distilled: DistilledDataset,
    settings: EvaluationRecipe,
    source: SourceFacts,
    tested_on: ScoredOn,
    dataset_id: str | None,
    *,
    seed: int,
    top1: float,
    test_count: int,
) -> StudentFacts:
    recipe = distilled.recipe
    elsewhere = ("student", "seeds", "epochs", "full_data_epochs") + (() if settings.label_epochs else ("label_epochs",))
    return StudentFacts(
        kind="student",
        architecture=settings.student,
        labels=KEPT.labels,
        epochs=settings.epochs or distilled.num_epochs,
        channels=distilled.images_uint8.shape[1],
        dataset=DistilledFacts(
            name=recipe.name if recipe else None,
            content=distilled.content,
            images=len(distilled.labels),
            hub_id=dataset_id,
        ),
        source=source,
        test=tested_on,
        recipe_fingerprint=recipe.fingerprint() if recipe else None,
        settings={key: value for key, value in asdict(settings).items() if key not in elsewhere},
        seed=seed,
        test_top1=top1,
        test_count=test_count,
    )
