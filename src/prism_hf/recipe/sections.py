"""The sections of a recipe, but for the optimization of pixels: data, teachers, squeeze, relabel, packaging, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .fields import (
    STRICT,
    AtLeastTwo,
    Count,
    CropScale,
    Fraction,
    FractionBelowOne,
    Index,
    Name,
    NonNegative,
    Positive,
    Seed,
    check_order,
    refuse_unused,
)


@dataclass(frozen=True, config=STRICT)
class DataRecipe:
    """The real dataset: where it is, its columns, and the working size.

    Attributes:
        source: `digits` (inside scikit-learn), a Hub id, or a local folder (Parquet, ImageFolder, save_to_disk).
        num_classes: K. Stated, not guessed, so that a plan needs no data; checked against the data.
        size: Side of the square working image in pixels.
        channels: 1 (gray) or 3 (RGB) for the synthetic images.
        config: Hub config of the source.
        revision: Hub revision of the source; `null` takes the newest and records which one that was.
        train_split: Split used for init, squeeze, the random-real control and the diversity reference.
        test_split: Split used to score students, and for nothing else.
        validation_fraction: If above 0, this stratified share of the *training* split is held out and takes the place
            of the test split, which is then never read. For tuning.
        image_column: Name of the image column; `null` finds the only column of type Image.
        label_column: Name of the label column; `null` finds the only column of type ClassLabel.
        licence: License or terms of the source, for the card.
    """

    source: Name
    num_classes: AtLeastTwo
    size: Annotated[int, Field(ge=8, lt=2**15)]  # the tables hold boxes in int16
    channels: Literal[1, 3] = 3
    config: Name | None = None
    revision: Name | None = None
    train_split: Name = "train"
    test_split: Name = "test"
    validation_fraction: FractionBelowOne = 0.0
    image_column: Name | None = None
    label_column: Name | None = None
    licence: Name = "unknown"

    @property
    def tested_on(self) -> str:
        """What students are scored on, for tables."""
        return "training images that were held out" if self.validation_fraction else "test images"


@dataclass(frozen=True, config=STRICT)
class TeachersRecipe:
    """Who supervises what: the decoupling that is PRISM. An empty `bn_pool` is SRe2L (one teacher for both losses).

    A teacher is `squeeze:<timm architecture>` (trained on this recipe's data), a timm name (`resnet18.tv_in1k`),
    `hf-hub:org/name@revision`, `local-dir:path`, or `transformers:org/name`.

    Attributes:
        logit: The logit teacher; alone in supplying the classification loss.
        bn_pool: Other BN teachers, from which extras are drawn.
        include_logit: The logit teacher is always a BN teacher too (PRISM's published setting).
        extras: At most this many draws from the pool.
        draw_probability: Each draw is made with this probability; uniform, without replacement.
        selection: `per_slot`: drawn once per slot, or group of slots that share a batch (paper: pre-distillation); with
            `within_class` batches once per batch. `per_iteration`: drawn anew each iteration (intra-distillation).
            `cycle` (G-VBSM): nothing is drawn; at each iteration the next of logit teacher and pool supplies both losses.
        verifier: A classifier outside logit teacher and pool that judges the synthetic images; never in the loss.
    """

    logit: Name
    bn_pool: tuple[Name, ...] = ()
    include_logit: bool = True
    extras: Index = 3
    draw_probability: Fraction = 0.5
    selection: Literal["per_slot", "per_iteration", "cycle"] = "per_slot"
    verifier: Name | None = None

    def __post_init__(self) -> None:
        if len(set(self.bn_pool)) != len(self.bn_pool):
            raise ValueError("bn_pool names a teacher twice; draws are without replacement, so name each once")
        if self.logit in self.bn_pool:
            raise ValueError(
                f"bn_pool contains the logit teacher {self.logit!r}; remove it there, `include_logit` decides its part"
            )
        if self.verifier is not None and self.verifier in (self.logit, *self.bn_pool):
            raise ValueError(
                f"verifier {self.verifier!r} is also a teacher; a verifier must be held out, name another architecture"
            )
        if not self.bn_pool and not self.include_logit:
            raise ValueError("no BN teacher: bn_pool is empty and include_logit is false; set one of the two")
        if self.selection == "cycle":
            refuse_unused(self, ("include_logit", "extras", "draw_probability"), "selection cycle draws no teacher")

    @property
    def synthesis_names(self) -> tuple[str, ...]:
        """Teachers in the loss, logit teacher first."""
        return (self.logit, *self.bn_pool)

    @property
    def bn_candidates(self) -> tuple[str, ...]:
        """Every BN teacher that may be drawn; each must have something to align."""
        if self.selection == "cycle":
            return self.synthesis_names
        return ((self.logit,) if self.include_logit else ()) + (self.bn_pool if self.extras else ())


@dataclass(frozen=True, config=STRICT)
class SqueezeRecipe:
    """How `squeeze:` teachers are trained (SRe2L stage 1): AdamW, one-cycle learning rate, crops and pixel noise.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Images per step; the incomplete last batch of an epoch is dropped (BN statistics).
        lr: Peak learning rate of the one-cycle schedule.
        weight_decay: AdamW weight decay.
        crop_scale: Smallest and largest share of the image area kept by a random crop.
        flip: Horizontal flips with probability 0.5.
        noise_std: Largest standard deviation of Gaussian pixel noise, in [0, 1] pixel units; drawn per image.
        seed: Seed of the teachers; `null` takes the recipe's. With a seed of their own, recipes that differ in theirs share
            teachers.
    """

    epochs: Count = 14
    batch_size: AtLeastTwo = 64
    lr: Positive = 5.0e-3
    weight_decay: NonNegative = 0.05
    crop_scale: CropScale = (0.6, 1.0)
    flip: bool = False
    noise_std: NonNegative = 0.1
    seed: Seed | None = None

    def __post_init__(self) -> None:
        check_order("squeeze.crop_scale", self.crop_scale)


@dataclass(frozen=True, config=STRICT)
class RelabelView:
    """The recorded views of the relabel stage.

    Attributes:
        crop_scale: Smallest and largest share of the area kept by each image's own random resized crop.
        flip: Horizontal flips with probability 0.5, each image its own.
        mix: `cutmix` (one box per batch), `mixup` (one weight per batch) or `none`.
        mix_alpha: Both parameters of the Beta distribution of the mixing weight.
    """

    crop_scale: CropScale = (0.25, 1.0)
    flip: bool = True
    mix: Literal["cutmix", "mixup", "none"] = "cutmix"
    mix_alpha: Positive = 1.0

    def __post_init__(self) -> None:
        check_order("relabel.view.crop_scale", self.crop_scale)


@dataclass(frozen=True, config=STRICT)
class RelabelRecipe:
    """Which teachers label the shipped images, under which views.

    Attributes:
        teachers: Who labels.
        ensemble: `mean` of the logits; `norm_balanced_mean`: each teacher's (B, K) logits are first rescaled to the mean
            Frobenius norm over the teachers; `weighted`: with `weights`.
        weights: One per teacher, for `weighted`; they are divided by their sum.
        epochs: Views per image.
        batch_size: Images per batch; part of the method, since mixing and norm balance look at the batch.
        view: How a view is drawn.
    """

    teachers: Annotated[tuple[Name, ...], Field(min_length=1)]
    epochs: Count = 300
    batch_size: AtLeastTwo = 50
    ensemble: Literal["mean", "norm_balanced_mean", "weighted"] = "norm_balanced_mean"
    weights: tuple[Positive, ...] | None = None
    view: RelabelView = Field(default_factory=RelabelView)

    def __post_init__(self) -> None:
        if len(set(self.teachers)) != len(self.teachers):
            raise ValueError("relabel.teachers names a teacher twice; use ensemble weighted to give one more weight")
        if (self.ensemble == "weighted") != (self.weights is not None):
            raise ValueError("weights belong to ensemble weighted: set both or neither")
        if self.weights is not None and len(self.weights) != len(self.teachers):
            raise ValueError(f"{len(self.weights)} weights for {len(self.teachers)} teachers; give one weight each")


@dataclass(frozen=True, config=STRICT)
class PackagingRecipe:
    """How the images are encoded and the tables cut.

    Attributes:
        image_format: `png` and `webp` (RGB only) are lossless; `jpeg` is not, and the labels are those of the decoded JPEG.
        jpeg_quality: For `jpeg`.
        shard_megabytes: A new Parquet file is started when one has reached this size.
    """

    image_format: Literal["png", "webp", "jpeg"] = "png"
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    shard_megabytes: Count = 500


@dataclass(frozen=True, config=STRICT)
class EvaluationRecipe:
    """How students are trained from scratch; the same protocol for every row of the table.

    Attributes:
        student: timm architecture, or `transformers:<model type>` for a default configuration of that family.
        seeds: One student per seed and row.
        batch_size: Images per step.
        epochs: Epochs to train, each with a recorded epoch of views; `null` uses all that the folder holds, once.
        label_epochs: Only the first so many recorded epochs of views are used, in turn; `null`: as many as `epochs`. Fewer
            need fewer bytes of labels.
        loss: Soft-label loss: `mse_ce`: MSE(student logits, stored logits) + ce_weight * CE; `kl`: KL at `temperature`;
            `dist`: correlations of classes and of images at `temperature`; `cosine`: 1 - cosine of centered logits, plus
            ce_weight * CE. See `soft_label_loss`.
        ce_weight: Weight of the CE term of `mse_ce` and `cosine`.
        temperature: Temperature of `kl` and `dist`.
        lr: AdamW learning rate; cosine to zero, no jump.
        weight_decay: AdamW weight decay; none on one-dimensional parameters.
        ema: Decay of an exponential moving average of the student's weights; 0 is off.
        full_data_epochs: Epochs of the ceiling row (all real training images, hard labels); 0 leaves the row out and
            the table says so.
    """

    student: Name
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    batch_size: AtLeastTwo = 50
    epochs: Count | None = None
    label_epochs: Count | None = None
    loss: Literal["mse_ce", "kl", "dist", "cosine"] = "mse_ce"
    ce_weight: NonNegative = 0.1
    temperature: Positive = 20.0
    lr: Positive = 1.0e-3
    weight_decay: NonNegative = 0.01
    ema: FractionBelowOne = 0.0
    full_data_epochs: Index = 20

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ, got {list(self.seeds)}")
