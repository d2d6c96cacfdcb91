"""Students trained from scratch: on a dataset, on its controls, and on all real images.

Legend: B images, C channels, H W pixels, K classes.

The controls answer the field's criticism (arXiv 2604.18811, 2502.06434): random real images under the very same
relabeling and protocol, hard labels only, and the full training set. Last epoch, several seeds.
"""

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
from ..runtime import Checkpoint, derived_seed

log = logging.getLogger(__name__)
Labels = Literal["soft", "hard", "image"]

_ON_DEVICE = 2**25
"""Bytes of uint8 images that are put on the device once; of a larger set each batch comes from the mapped file."""


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
    """Train one student on what a dataset folder contains: images, labels, views; nothing else.

    The seed is that of the weights; the order of images comes from the views. Batches and steps are the same for all kinds
    of labels (see `Row`), and the loss on `hard` ones is cross-entropy. A training goes on from its checkpoint.

    Returns:
        The student in eval mode, on `device`, taking the reference normalization.

    Raises:
        DataError: The folder holds fewer epochs of views than `settings.label_epochs`, or else `settings.epochs`.

    Example:
        >>> student = train_student(load_distilled(folder), recipe.evaluation, labels="soft", seed=0, device=device)
    """
    epochs, recorded = epochs_of(source, settings)
    batch_size, per_image = settings.batch_size, labels == "image"

    def loss(logits: Tensor, teacher_logits: Tensor, shares: Tensor) -> Tensor:
        if labels == "hard":
            return F.cross_entropy(logits, shares)
        return soft_label_loss(logits, teacher_logits, shares, settings)

    batches = Batches(lambda start: _view_batches(source, epochs, batch_size, device, start, recorded, per_image=per_image))
    steps, what = epochs * len(batch_ranges(len(source.labels), batch_size)), f"student {settings.student}, seed {seed}"
    classes, channels = len(source.class_names), source.images_uint8.shape[1]
    with seeded(seed, device):
        return _fit(settings, classes, channels, device, batches, loss, steps, what, checkpoint)


def epochs_of(source: DistilledDataset, settings: EvaluationRecipe) -> tuple[int, int]:
    """Epochs of the training, and how many recorded epochs of views it takes in turn.

    Raises:
        DataError: The dataset holds fewer.
    """
    epochs = settings.epochs or source.num_epochs
    recorded = settings.label_epochs or epochs
    if recorded > source.num_epochs:
        key = "label_epochs" if settings.label_epochs else "epochs"
        raise DataError(f"the dataset holds {source.num_epochs} epochs of views, evaluation.{key} is {recorded}; lower it")
    return epochs, recorded


def label_bytes(source: DistilledDataset, settings: EvaluationRecipe, labels: Labels) -> int | None:
    """Bytes of stored labels that a student reads; `None` for a dataset that is not in files.

    `soft`: views and logits of the epochs that it reads; `image`: one row of logits per image; `hard`: none.
    """
    if labels == "hard":
        return 0
    if labels == "image":
        return source.image_label_bytes
    return None if source.view_bytes is None else source.view_bytes[min(epochs_of(source, settings))]


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
    """Train the ceiling: the same student, optimizer and crops on all real training images, hard labels, no mixing."""
    labels = torch.from_numpy(split.labels)

    def make(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = draw_views(len(rows), split.size, generator, crop_scale=view.crop_scale, flip=view.flip)
        images = to_reference(split.images(rows).to(device))
        return resample(images, drawn.crop, drawn.flip), labels[rows].to(device)

    parts, epochs = batch_ranges(len(split), settings.batch_size), settings.full_data_epochs
    generator = torch.Generator().manual_seed(derived_seed(seed, "full data"))
    batches = ShuffledBatches(parts, epochs, generator, make, count=len(split))
    what = f"student {settings.student} on all real images, seed {seed}"
    steps, loss = epochs * len(parts), F.cross_entropy
    with seeded(seed, device):
        return _fit(settings, num_classes, split.channels, device, batches, loss, steps, what, checkpoint)


def _fit(
    settings: EvaluationRecipe,
    classes: int,
    channels: int,
    device: torch.device,
    batches: Batches,
    loss: Callable[..., Tensor],
    steps: int,
    what: str,
    checkpoint: Checkpoint | None,
) -> nn.Module:
    rate, decay, ema = settings.lr, settings.weight_decay, settings.ema
    network = build_network(settings.student, num_classes=classes, channels=channels).to(device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return fit(network, batches, loss, steps=steps, lr=rate, weight_decay=decay, ema=ema, what=what, checkpoint=checkpoint)


def _view_batches(
    source: DistilledDataset,
    epochs: int,
    batch_size: int,
    device: torch.device,
    start: int,
    recorded: int,
    *,
    per_image: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views, logits and class shares of each batch after the first `start`; `recorded` epochs are taken in turn."""
    images, parts, classes = source.images_uint8, batch_ranges(len(source.labels), batch_size), len(source.class_names)
    if images.nbytes <= _ON_DEVICE:
        images = images.to(device)
    for number in range(start, epochs * len(parts)):
        epoch, part = divmod(number, len(parts))
        rows, logits = source.views(epoch % recorded, parts[part])
        partner, weight = rows.view.mix_with.clamp(min=0), rows.view.mix_weight
        if per_image:
            own, other = source.teacher_logits[rows.image_index], source.teacher_logits[partner]
            logits = torch.lerp(other.float(), own.float(), weight.view(-1, 1))
        shares = class_shares(source.labels[rows.image_index], source.labels[partner], weight, classes)
        shown = rows.replay(images, lambda picked: to_reference(picked.to(device)))
        yield shown, logits.to(device, torch.float32), shares.to(device)


def keep_student(
    student: nn.Module,
    top1: float,
    *,
    folder: Path,
    distilled: DistilledDataset,
    settings: EvaluationRecipe,
    source: SourceFacts,
    tested_on: ScoredOn,
    test_count: int,
    dataset_id: str | None = None,
) -> None:
    """Store the first student of row `KEPT` as a model folder; one that cannot be stored (not of timm) leaves a log line.

    `source` is the real data behind the distilled set; `dataset_id` is its Hub id, or `None` if it is a local folder.
    """
    _, channels, _, size = distilled.images_uint8.shape
    recipe = distilled.recipe
    elsewhere = ("student", "seeds", "epochs", "full_data_epochs") + (() if settings.label_epochs else ("label_epochs",))
    facts = StudentFacts(
        kind="student",
        architecture=settings.student,
        labels=KEPT.labels,
        epochs=settings.epochs or distilled.num_epochs,
        channels=channels,
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
        seed=settings.seeds[0],
        test_top1=top1,
        test_count=test_count,
    )
    try:
        # One that is there belongs to a score that is gone, or to other seeds.
        store_network(student, folder, facts, size=size, class_names=distilled.class_names, replace=True)
    except RecipeError as error:
        log.info("student not kept: %s", error)
