"""Students trained from scratch: on a dataset, on its controls, and on all real images.

Legend: B images, C channels, H x W pixels, K classes.

The controls respond to criticism of the field (arXiv 2604.18811, 2502.06434): random real images with the same relabeling
and protocol, hard labels only, and the full training set. The score is that of the last epoch, over several seeds.
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
    AtStep,
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
from ..runtime import Checkpoint, derived_seed, to_device

log = logging.getLogger(__name__)
Labels = Literal["soft", "hard", "image"]

_ON_DEVICE = 2**25
"""Maximum bytes of uint8 images that are kept on the device; batches of a larger set are read from the mapped file."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        images: `distilled`, `random_real` or `full`.
        labels: `soft` (stored logits of the views), `hard` (the class) or `image` (stored logits of the image itself, so
            one label per image for all epochs). `hard` and `image` labels are mixed in the same ratio as the view.
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
"""The default rows of the table."""
KEPT = Row("distilled", "soft")
"""The row whose first student is stored as a model."""


def train_student(
    source: DistilledDataset,
    settings: EvaluationRecipe,
    *,
    labels: Labels,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    at_step: AtStep = lambda _: None,
) -> nn.Module:
    """Train one student only on the contents of a dataset folder: images, labels and views.

    The seed sets the initial weights; the order of images comes from the views. Batches and steps are the same for all
    kinds of labels (see `Row`). The loss for `hard` labels is cross-entropy. Training resumes from the checkpoint.

    Returns:
        The student in eval mode, on `device`; its input uses the reference normalization.

    Raises:
        DataError: The dataset has fewer epochs of views than `settings.label_epochs`, or else `settings.epochs`.

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
    steps, title = epochs * len(batch_ranges(len(source.labels), batch_size)), f"student {settings.student}, seed {seed}"
    classes, channels = len(source.class_names), source.images_uint8.shape[1]
    with seeded(seed, device):
        return _fit(settings, classes, channels, device, batches, loss, steps, title, checkpoint, at_step)


def steps_of(source: DistilledDataset | ImageSplit, settings: EvaluationRecipe) -> int:
    """Return the number of training steps of a student on a dataset, or on all real images."""
    epochs = settings.full_data_epochs if isinstance(source, ImageSplit) else epochs_of(source, settings)[0]
    return epochs * len(batch_ranges(len(source.labels), settings.batch_size))


def epochs_of(source: DistilledDataset, settings: EvaluationRecipe) -> tuple[int, int]:
    """Return the number of training epochs, and the number of stored epochs of views that training cycles through.

    Raises:
        DataError: The dataset has fewer epochs of views.
    """
    epochs = settings.epochs or source.num_epochs
    recorded = settings.label_epochs or epochs
    if recorded > source.num_epochs:
        key = "label_epochs" if settings.label_epochs else "epochs"
        raise DataError(f"the dataset has {source.num_epochs} epochs of views, evaluation.{key} is {recorded}; lower it")
    return epochs, recorded


def label_bytes(source: DistilledDataset, settings: EvaluationRecipe, labels: Labels) -> int | None:
    """Return the bytes of stored labels that a student reads; `None` for a dataset that is not in files.

    `soft`: views and logits of the epochs that it reads; `image`: one row of logits per image; `hard`: 0.
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
    at_step: AtStep = lambda _: None,
) -> nn.Module:
    """Train the upper bound: the same student, optimizer and crops on all real images, with hard labels and no mixing."""
    labels = torch.from_numpy(split.labels)

    def make(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = draw_views(len(rows), split.size, generator, crop_scale=view.crop_scale, flip=view.flip)
        images = to_reference(to_device(split.images(rows), device))
        return resample(images, drawn.crop, drawn.flip), to_device(labels[rows], device)

    parts, epochs = batch_ranges(len(split), settings.batch_size), settings.full_data_epochs
    generator = torch.Generator().manual_seed(derived_seed(seed, "full data"))
    batches = ShuffledBatches(parts, epochs, generator, make, count=len(split))
    title = f"student {settings.student} on all real images, seed {seed}"
    steps, loss = epochs * len(parts), F.cross_entropy
    with seeded(seed, device):
        return _fit(settings, num_classes, split.channels, device, batches, loss, steps, title, checkpoint, at_step)


def _fit(
    settings: EvaluationRecipe,
    classes: int,
    channels: int,
    device: torch.device,
    batches: Batches,
    loss: Callable[..., Tensor],
    steps: int,
    title: str,
    checkpoint: Checkpoint | None,
    at_step: AtStep,
) -> nn.Module:
    network = build_network(settings.student, num_classes=classes, channels=channels).to(device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return fit(
        network,
        batches,
        loss,
        steps=steps,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        ema=settings.ema,
        what=title,
        checkpoint=checkpoint,
        at_step=at_step,
    )


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
    """Yield views, logits and class shares of each batch from number `start` on, cycling through `recorded` epochs."""
    images, parts, classes = source.images_uint8, batch_ranges(len(source.labels), batch_size), len(source.class_names)
    if images.nbytes <= _ON_DEVICE:
        images = images.to(device)
    for number in range(start, epochs * len(parts)):
        epoch, part = divmod(number, len(parts))
        rows, logits = source.views(epoch % recorded, parts[part])
        partner, weight = rows.view.mix_with.clamp(min=0), rows.view.mix_weight
        if per_image:
            first, second = source.teacher_logits[rows.image_index], source.teacher_logits[partner]
            logits = torch.lerp(second.float(), first.float(), weight.view(-1, 1))
        shares = class_shares(source.labels[rows.image_index], source.labels[partner], weight, classes)
        views = rows.replay(images, lambda picked: to_reference(to_device(picked, device)))
        yield views, to_device(logits, device).float(), to_device(shares, device)


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
    """Store the first student of row `KEPT` as a model folder; log a line if it cannot be stored (not a timm model).

    `source` is the real data behind the distilled set. `dataset_id` is the set's Hub id, or `None` for a local folder.
    """
    _, channels, _, size = distilled.images_uint8.shape
    recipe = distilled.recipe
    excluded = ("student", "seeds", "epochs", "full_data_epochs") + (() if settings.label_epochs else ("label_epochs",))
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
        settings={key: value for key, value in asdict(settings).items() if key not in excluded},
        seed=settings.seeds[0],
        test_top1=top1,
        test_count=test_count,
    )
    try:
        # An existing folder belongs to a score that no longer exists, or to other seeds.
        store_network(student, folder, facts, size=size, class_names=distilled.class_names, replace=True)
    except RecipeError as error:
        log.info("student not stored: %s", error)
