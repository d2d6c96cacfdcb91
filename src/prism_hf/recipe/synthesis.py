"""The recipe section for the optimization of pixels: statistics, optimizer, views, start images."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .sections import (
    STRICT,
    AtLeastTwo,
    Count,
    CropScale,
    FractionBelowOne,
    Index,
    NonNegative,
    Positive,
    PositiveFraction,
)


@dataclass(frozen=True, config=STRICT)
class SynthesisView:
    """The random view of one synthesis step. One draw serves the whole batch."""

    crop_scale: CropScale = (0.08, 1.0)  # [1, 1] is no crop
    flip: bool = True  # horizontally, with probability 0.5
    jitter: Index = 32  # roll by 0 to this many pixels along each axis
    # `cosine` (CDA, arXiv 2311.18838): the lower bound of `crop_scale` falls along half a cosine, from the upper bound at
    # the first iteration to its own value at the last.
    curriculum: Literal["none", "cosine"] = "none"


@dataclass(frozen=True, config=STRICT)
class Ladder:
    """Fewer iterations for later slots (DELT's early-late idea): `iterations - step * (slot mod period)`."""

    step: Count
    period: AtLeastTwo


@dataclass(frozen=True, config=STRICT)
class ConvStatistics:
    """Statistics of convolution inputs in addition to BN (G-VBSM, arXiv 2311.17950): per channel and per patch."""

    patch: Count = 16  # side of a patch in pixels of the feature map; a smaller map is one patch
    drop: FractionBelowOne = 0.0  # probability of omitting a layer from a step


@dataclass(frozen=True, config=STRICT)
class Densification:
    """A loss for diversity within a class (G-VBSM): KL of the softmax of Gram eigenvalues, `temperature` to 1."""

    weight: Positive = 1.0  # weight in the loss
    temperature: Positive = 4.0  # of the target
    size: Count = 32  # images are first pooled to this side


@dataclass(frozen=True, config=STRICT)
class Mosaic:
    """Start images composed of the patches that the logit teacher classifies best (RDED, arXiv 2312.03526)."""

    candidates: Count = 300  # real images of the class to cut patches from
    crops: Count = 5  # crops of each candidate; the best one is kept
    crop_scale: CropScale = (0.08, 1.0)
    grid: AtLeastTwo = 2  # number of patches along each side
    # `null`: the patches with the lowest loss, best first. A share: patches drawn at random from this share of the
    # candidates, lowest loss first. With `crops: 1, crop_scale: [1, 1]` the patches are whole images (PCA, ICML 2026).
    easiest: PositiveFraction | None = None


@dataclass(frozen=True, config=STRICT)
class SynthesisRecipe:
    """The optimization of pixels (PRISM, arXiv 2511.09905; stage "recover" of SRe2L, arXiv 2306.13092)."""

    ipc: Count  # images per class
    batch_size: AtLeastTwo = 100  # part of the method: the BN loss uses the statistics of the images in a batch
    iterations: Index = 4000  # Adam steps per batch; 0 ships the start images unchanged
    lr: Positive = 0.05  # learning rate of Adam, in the reference normalization
    # `noise`: N(0, 1) in the reference normalization. `real_index`: image number `slot` of the class. `real_random`: a
    # seeded random image of the class. `real_median`: the images whose logit-teacher loss is nearest to the median of the
    # class (DELT). `real_kmeans`: the images nearest to `ipc` cluster centers of the class in logit-teacher features.
    init: Literal["noise", "real_index", "real_random", "real_median", "real_kmeans", "mosaic"] = "real_random"
    # A batch contains consecutive classes of the same slot(s), or consecutive slots of the same class(es).
    batch_order: Literal["cross_class", "within_class"] = "cross_class"
    # With `cross_class`: the number of consecutive slots that share a batch, a teacher draw and an iteration count. The
    # paper uses 1. With few classes, use more, since the statistics of a few images are not meaningful.
    slots_per_batch: Count = 1
    ladder: Ladder | None = None
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.5, 0.9)  # of Adam
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # `cosine`: decay to zero
    bn_weight: NonNegative = 0.01  # weight of the BN alignment relative to the classification loss (r_bn)
    # `sum`: over layers, as published. `mean`: over layers, so that deep teachers do not dominate. `balanced`: the sum,
    # divided by its value for the start images of the batch, so that no teacher dominates.
    bn_reduction: Literal["sum", "mean", "balanced"] = "sum"
    first_bn_multiplier: NonNegative = 10.0  # weight of each teacher's first BN layer
    view: SynthesisView = Field(default_factory=SynthesisView)
    clamp: bool = True  # to the valid pixel range after each step
    # The verifier scores the images at this interval of iterations (rounded up to tens) and at the end, for the log only.
    verify_every: Count = 100
    # Momentum of a moving average of the matched statistics; the gradient is that of the batch alone (straight-through).
    # 0 turns it off; G-VBSM uses 0.4.
    momentum: FractionBelowOne = 0.0
    conv: ConvStatistics | None = None
    densification: Densification | None = None  # needs several images of a class in a batch
    mosaic: Mosaic | None = None  # for init `mosaic`
    # For init `real_random` and `real_kmeans`: share of each class to choose from, lowest logit-teacher loss first.
    easiest: PositiveFraction = 1.0

    @property
    def teacher_chooses(self) -> bool:
        """Whether the start images depend on the logit teacher."""
        return self.init in ("real_median", "real_kmeans", "mosaic") or self.easiest < 1

    def __post_init__(self) -> None:
        if self.batch_order == "within_class" and self.slots_per_batch != 1:
            raise ValueError("slots_per_batch needs batch_order cross_class; remove it")
        if (self.init == "mosaic") != (self.mosaic is not None):
            raise ValueError("mosaic belongs to init mosaic: set both (`mosaic: {}` uses RDED's values) or neither")
        if self.easiest != 1 and self.init not in ("real_random", "real_kmeans"):
            raise ValueError("easiest belongs to init real_random or real_kmeans; remove it (mosaic has its own)")
        if self.iterations == 0 and self.init == "noise":
            raise ValueError("iterations 0 ships the start images, but init is noise; use real images, or raise iterations")
        if self.densification is not None and self.batch_order == "cross_class" and self.slots_per_batch == 1:
            raise ValueError(
                "densification compares images of one class; use batch_order within_class, or raise slots_per_batch"
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
                    f"ladder leaves {shortest} iterations for the last slot; raise iterations, or lower its step"
                )
