"""How pixels are optimized, as a section of a recipe: statistics, optimizer, views, start images."""

from __future__ import annotations

from typing import Literal

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
    NonNegative,
    Positive,
    PositiveFraction,
    check_order,
)


@dataclass(frozen=True, config=STRICT)
class SynthesisView:
    """The random view of one synthesis step, one draw for the whole batch.

    Attributes:
        crop_scale: Smallest and largest share of the area kept by the random resized crop; [1, 1] is no crop.
        flip: Horizontal flip with probability 0.5.
        jitter: Roll by 0 to this many pixels along each axis.
        curriculum: `cosine` (CDA, arXiv 2311.18838): the smallest share falls from the largest at the first iteration to
            its own value at the last, along half a cosine.
    """

    crop_scale: CropScale = (0.08, 1.0)
    flip: bool = True
    jitter: Index = 32
    curriculum: Literal["none", "cosine"] = "none"

    def __post_init__(self) -> None:
        check_order("synthesis.view.crop_scale", self.crop_scale)


@dataclass(frozen=True, config=STRICT)
class Ladder:
    """Fewer iterations for later slots (DELT's early-late idea): `iterations - step * (slot mod period)`.

    Attributes:
        step: Iterations less per slot.
        period: After this many slots the ladder starts again.
    """

    step: Count
    period: AtLeastTwo


@dataclass(frozen=True, config=STRICT)
class ConvStatistics:
    """Statistics of convolution inputs, beside those of BN (G-VBSM, arXiv 2311.17950): per channel, and per patch.

    Attributes:
        patch: Side of a patch in pixels of the feature map; a smaller map is one patch.
        drop: Each layer is left out of a step with this probability.
    """

    patch: Count = 16
    drop: FractionBelowOne = 0.0


@dataclass(frozen=True, config=STRICT)
class Densification:
    """Images of a class shall span more directions (G-VBSM): KL of the softmax of Gram eigenvalues, `temperature` to 1.

    Attributes:
        weight: Weight in the loss.
        temperature: Of the target.
        size: Images are pooled to this side first.
    """

    weight: Positive = 1.0
    temperature: Positive = 4.0
    size: Count = 32


@dataclass(frozen=True, config=STRICT)
class Mosaic:
    """How a start image is put together (RDED, arXiv 2312.03526): four patches that the logit teacher knows best.

    Attributes:
        candidates: Real images of the class that patches are cut from.
        crops: Crops of each, of which the best is kept.
        crop_scale: Smallest and largest share of the area of a crop.
        grid: Patches along each side.
    """

    candidates: Count = 300
    crops: Count = 5
    crop_scale: CropScale = (0.08, 1.0)
    grid: AtLeastTwo = 2

    def __post_init__(self) -> None:
        check_order("synthesis.mosaic.crop_scale", self.crop_scale)


@dataclass(frozen=True, config=STRICT)
class SynthesisRecipe:
    """How pixels are optimized (PRISM, arXiv 2511.09905; stage "recover" of SRe2L, arXiv 2306.13092).

    Attributes:
        ipc: Images per class.
        init: `noise` (N(0, 1) in the reference normalization), `real_index` (image number `slot` of the class),
            `real_random` (a seeded random image of the class), `real_median` (those whose loss at the logit teacher is
            nearest to the median of the class: DELT), `real_kmeans` (the images nearest to the `ipc` centers of the class
            in the features of the logit teacher), or `mosaic` (see there).
        batch_order: `cross_class`: a batch holds consecutive classes of the same slot(s); `within_class`: consecutive
            slots of the same class(es).
        batch_size: Images optimized together; their statistics are the BN loss, so the batch is part of the method.
        slots_per_batch: With `cross_class`: how many consecutive slots share a batch, a teacher draw and an iteration
            count. The paper has 1; few classes need more, since statistics of a handful of images mean little.
        iterations: Adam steps per batch; 0 ships the start images as they are.
        ladder: Fewer iterations for later slots, or `null` for the same number everywhere.
        lr: Adam learning rate in the reference normalization.
        betas: Adam's betas.
        lr_schedule: `cosine` (to zero) or `constant`.
        bn_weight: Weight of the BN alignment against the classification loss (r_bn).
        bn_reduction: `sum` over layers, as published; `mean` over layers, so that deep teachers do not dominate; or
            `balanced`: the sum, divided by what it is for the start images of the batch, so that no teacher does.
        first_bn_multiplier: Weight of each teacher's first BN layer.
        momentum: Share of the past in a moving average of the statistics that are matched; its gradient is that of the
            batch (straight through). 0 is off. G-VBSM has 0.4.
        conv: Match the statistics of convolutions too, or `null`.
        densification: Its weight and shape, or `null`; it needs several images of a class in a batch.
        mosaic: For init `mosaic`.
        easiest: For init `real_kmeans`: only this share of each class, the images of the lowest loss at the logit teacher.
        view: The random view of each step.
        clamp: Clamp to the valid pixel range after each step.
        verify_every: Ask the verifier each this many iterations, at steps of ten, and at the end; it is only logged.
    """

    ipc: Count
    batch_size: AtLeastTwo = 100
    iterations: Index = 4000
    lr: Positive = 0.05
    init: Literal["noise", "real_index", "real_random", "real_median", "real_kmeans", "mosaic"] = "real_random"
    batch_order: Literal["cross_class", "within_class"] = "cross_class"
    slots_per_batch: Count = 1
    ladder: Ladder | None = None
    betas: tuple[Fraction, Fraction] = (0.5, 0.9)
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    bn_weight: NonNegative = 0.01
    bn_reduction: Literal["sum", "mean", "balanced"] = "sum"
    first_bn_multiplier: NonNegative = 10.0
    view: SynthesisView = Field(default_factory=SynthesisView)
    clamp: bool = True
    verify_every: Count = 100
    momentum: FractionBelowOne = 0.0
    conv: ConvStatistics | None = None
    densification: Densification | None = None
    mosaic: Mosaic | None = None
    easiest: PositiveFraction = 1.0

    def __post_init__(self) -> None:
        if max(self.betas) >= 1:
            raise ValueError(f"betas must be below 1, got {list(self.betas)}")
        if self.batch_order == "within_class" and self.slots_per_batch != 1:
            raise ValueError("slots_per_batch needs batch_order cross_class; a within_class batch takes slots as they come")
        if (self.init == "mosaic") != (self.mosaic is not None):
            raise ValueError("mosaic belongs to init mosaic: set both (`mosaic: {}` takes RDED's values) or neither")
        if self.easiest != 1 and self.init != "real_kmeans":
            raise ValueError("easiest belongs to init real_kmeans; leave it out")
        if self.iterations == 0 and self.init == "noise":
            raise ValueError("iterations 0 ships the start images, and init is noise; take real images, or iterate")
        if self.densification is not None and self.batch_order == "cross_class" and self.slots_per_batch == 1:
            raise ValueError(
                "densification compares images of one class, and a cross_class batch of one slot has one of each; use "
                "batch_order within_class, or raise slots_per_batch"
            )
        if self.bn_reduction == "balanced" and (self.conv is not None or self.momentum):
            raise ValueError("bn_reduction balanced is for plain BN statistics; leave out conv and momentum, or use mean")
        if self.ladder is not None:
            if self.batch_order == "within_class" or self.slots_per_batch != 1:
                raise ValueError(
                    "ladder gives every slot its own iterations, so a batch must hold one slot: "
                    "use batch_order cross_class and slots_per_batch 1, or set ladder to null"
                )
            shortest = self.iterations - self.ladder.step * (self.ladder.period - 1)
            if shortest < 1:
                raise ValueError(
                    f"ladder leaves {shortest} iterations for the last slot of a period; raise iterations, or lower "
                    "ladder.step or ladder.period"
                )
