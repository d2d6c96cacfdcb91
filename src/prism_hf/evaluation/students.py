"""Students trained from scratch: on a dataset, on its controls, and on all real images.

Legend: B images, C channels, H x W pixels, K classes.

The controls respond to criticism of the field (arXiv 2604.18811, 2502.06434): random real images with the same relabeling
and protocol, hard labels only, and the full training set. The score is that of the last epoch, over several seeds.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dataset import DistilledDataset
from ..errors import DataError, RecipeError
from ..images import ImageSplit, ViewRows, draw_views, from_columns, resample, to_reference
from ..method import class_shares, drawn_batches, hard_label_loss, joined, soft_label_loss
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
from ..recipe import TOP_K_LOSSES, EvaluationRecipe, RelabelView, batch_ranges
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
        DataError: The dataset has fewer epochs of views than `settings.label_epochs`, or else `settings.epochs`; or it does
            not store the labels that the loss needs.

    Example:
        >>> student = train_student(load_distilled(folder), recipe.evaluation, labels="soft", seed=0, device=device)
    """
    _check_labels(source, settings, labels)

    def loss(logits: Tensor, shares: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        if labels == "hard":
            return F.cross_entropy(logits, shares)
        if teacher_logits is None:
            return hard_label_loss(logits, shares)
        return soft_label_loss(logits, teacher_logits, shares, settings)

    order, batch_size, per_image = label_order(source, settings, seed), settings.batch_size, labels == "image"
    batches = Batches(lambda start: _view_batches(source, order, batch_size, device, start, per_image=per_image, seed=seed))
    steps, title = steps_of(source, settings), f"student {settings.student}, seed {seed}"
    classes, channels = len(source.class_names), source.images_uint8.shape[1]
    with seeded(seed, device):
        return _fit(settings, classes, channels, device, batches, loss, steps, title, checkpoint, at_step)


def steps_of(source: DistilledDataset | ImageSplit, settings: EvaluationRecipe) -> int:
    """Return the number of training steps of a student on a dataset, or on all real images."""
    epochs = settings.full_data_epochs if isinstance(source, ImageSplit) else epochs_of(source, settings)[0]
    return epochs * len(batch_ranges(len(source.labels), settings.batch_size))


def _check_labels(source: DistilledDataset, settings: EvaluationRecipe, labels: Labels) -> None:
    if labels == "soft" and source.codec == "seed":
        raise DataError("the dataset stores no soft labels (relabel.codec seed); its teachers must compute them")
    if labels == "soft" and source.codec == "topk" and settings.loss not in TOP_K_LOSSES:
        raise DataError(
            f"the dataset stores only the highest logits of each view (relabel.codec topk), but evaluation.loss "
            f"{settings.loss} compares all of them; use {' or '.join(TOP_K_LOSSES)}"
        )
    stored = source.recipe.evaluation.temperature if source.recipe else settings.temperature
    if labels == "soft" and source.codec == "topk" and stored != settings.temperature:
        raise DataError(f"its labels (codec topk) are stored for evaluation.temperature {stored}; set it to that")


def epochs_of(source: DistilledDataset, settings: EvaluationRecipe) -> tuple[int, int]:
    """Return the number of training epochs (as the recipe plans them), and of stored epochs of views that they use.

    Raises:
        DataError: The dataset has fewer epochs of views.
    """
    pruned = source.recipe is not None and source.recipe.stored_labels.epochs < source.recipe.relabel.epochs
    planned = source.recipe.relabel.epochs if source.recipe is not None and pruned else source.num_epochs
    epochs = settings.epochs or planned
    with_soft = epochs - settings.hard_epochs
    if with_soft < 1:
        raise DataError(f"evaluation.hard_epochs is {settings.hard_epochs}, a student trains for {epochs} epochs; lower it")
    recorded = settings.label_epochs or (min(with_soft, source.num_epochs) if pruned else with_soft)
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
    return None if source.view_bytes is None else source.view_bytes[len(set(label_order(source, settings, 0)) - {None})]


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
        optimizer=settings.optimizer,
        stretch=settings.cosine_stretch,
        micro_batch=settings.micro_batch,
        what=title,
        checkpoint=checkpoint,
        at_step=at_step,
    )


def _view_batches(
    source: DistilledDataset,
    order: Sequence[int | None],
    batch_size: int,
    device: torch.device,
    start: int,
    *,
    per_image: bool,
    seed: int,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield views, class shares and logits of each batch from number `start` on; epochs with hard labels have no logits."""
    images, parts = source.images_uint8, batch_ranges(len(source.labels), batch_size)
    if images.nbytes <= _ON_DEVICE:
        images = images.to(device)
    first = start // len(parts)
    for epoch, stored in enumerate(order[first:], first):
        fresh = _fresh_views(source, seed, epoch) if stored is None else None
        mirrored = _mirrored(source, seed, epoch) if stored is not None and stored in order[:epoch] else None
        for part in parts[start % len(parts) if epoch == first else 0 :]:
            if stored is None:
                assert fresh is not None
                rows, logits = fresh[part.start : part.stop], None
            else:
                rows, logits = source.views(stored, part)
            partner, weight = rows.view.mix_with.clamp(min=0), rows.view.mix_weight
            if per_image and logits is not None:
                own, other = source.teacher_logits[rows.image_index], source.teacher_logits[partner]
                logits = torch.lerp(other.float(), own.float(), weight.view(-1, 1))
            shares = class_shares(source.labels[rows.image_index], source.labels[partner], weight, len(source.class_names))
            views = rows.replay(images, lambda picked: to_reference(to_device(picked, device)))
            if mirrored is not None:
                flip = to_device(mirrored[part.start : part.stop], device).view(-1, 1, 1, 1)
                views = torch.where(flip, views.flip(-1), views)
            batch = (views, to_device(shares, device))
            yield batch if logits is None else (*batch, to_device(logits, device).float())


def label_order(source: DistilledDataset, settings: EvaluationRecipe, seed: int) -> list[int | None]:
    """Return the stored epoch of views that each training epoch uses; `None` for the hard labels in the middle.

    Stored epochs are first used in order. When they are used again, it is in an order that the seed draws each time (LPLD,
    arXiv 2410.15919), and half of the views are mirrored if the recipe's views are flipped.
    """
    epochs, recorded = epochs_of(source, settings)
    order: list[int | None] = []
    for turn in range(-(-(epochs - settings.hard_epochs) // recorded)):
        generator = torch.Generator().manual_seed(derived_seed(seed, "label epochs", turn))
        order += (torch.randperm(recorded, generator=generator) if turn else torch.arange(recorded)).tolist()
    soft = order[: epochs - settings.hard_epochs]
    middle = (len(soft) + 1) // 2
    return [*soft[:middle], *[None] * settings.hard_epochs, *soft[middle:]]


def _mirrored(source: DistilledDataset, seed: int, epoch: int) -> Tensor | None:
    """Draw which views of an epoch are mirrored, (N,) bool; `None` if the recipe's views are never flipped."""
    if source.recipe is None or not source.recipe.relabel.view.flip:
        return None
    generator = torch.Generator().manual_seed(derived_seed(seed, "mirrored", epoch))
    return torch.rand(len(source.labels), generator=generator) < 0.5


def _fresh_views(source: DistilledDataset, seed: int, epoch: int) -> ViewRows:
    """Draw views of all images by the rules of the recipe. They need no storage, because their labels are the classes."""
    if source.recipe is None:
        raise DataError("the dataset has no recipe.yaml, whose relabel.view evaluation.hard_epochs needs; add the file")
    batches = drawn_batches(
        epoch,
        len(source.labels),
        source.images_uint8.shape[-1],
        source.recipe.relabel,
        seed=derived_seed(seed, "hard epochs"),
    )
    return from_columns(joined(columns for columns, *_ in batches))


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
    excluded = ["student", "seeds", "epochs", "full_data_epochs"]
    excluded += [key for key in ("label_epochs", "hard_epochs", "preset", "micro_batch") if not getattr(settings, key)]
    excluded += [key for key, plain in (("optimizer", "adamw"), ("cosine_stretch", 1.0)) if getattr(settings, key) == plain]
    facts = StudentFacts(
        kind="student",
        architecture=settings.student,
        labels=KEPT.labels,
        epochs=epochs_of(distilled, settings)[0],
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
