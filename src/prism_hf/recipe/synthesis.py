"""How pixels are optimized, as a section of a recipe: statistics, optimizer, views, start images."""

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
    """The random view of one synthesis step, one draw for the whole batch."""

    crop_scale: CropScale = (0.08, 1.0)  # [1, 1] is no crop
    flip: bool = True  # horizontally, with probability 0.5
    jitter: Index = 32  # roll by 0 to this many pixels along each axis
    # `cosine` (CDA, arXiv 2311.18838): the smallest share of a crop falls from the largest at the first iteration to its
    # own value at the last, along half a cosine.
    curriculum: Literal["none", "cosine"] = "none"


@dataclass(frozen=True, config=STRICT)
class Ladder:
    """Fewer iterations for later slots (DELT's early-late idea): `iterations - step * (slot mod period)`."""

    step: Count
    period: AtLeastTwo


@dataclass(frozen=True, config=STRICT)
class ConvStatistics:
    """Statistics of convolution inputs, beside those of BN (G-VBSM, arXiv 2311.17950): per channel, and per patch."""

    patch: Count = 16  # side of a patch in pixels of the feature map; a smaller map is one patch
    drop: FractionBelowOne = 0.0  # each layer is left out of a step with this probability


@dataclass(frozen=True, config=STRICT)
class Densification:
    """Images of a class shall span more directions (G-VBSM): KL of the softmax of Gram eigenvalues, `temperature` to 1."""

    weight: Positive = 1.0  # in the loss
    temperature: Positive = 4.0  # of the target
    size: Count = 32  # images are pooled to this side first


@dataclass(frozen=True, config=STRICT)
class Mosaic:
    """How a start image is put together (RDED, arXiv 2312.03526): patches that the logit teacher knows best."""

    candidates: Count = 300  # real images of the class that patches are cut from
    crops: Count = 5  # of each candidate; the best is kept
    crop_scale: CropScale = (0.08, 1.0)
    grid: AtLeastTwo = 2  # patches along each side


@dataclass(frozen=True, config=STRICT)
class SynthesisRecipe:
    """How pixels are optimized (PRISM, arXiv 2511.09905; stage "recover" of SRe2L, arXiv 2306.13092)."""

    ipc: Count  # images per class
    batch_size: AtLeastTwo = 100  # part of the method: the statistics of the images optimized together are the BN loss
    iterations: Index = 4000  # Adam steps per batch; 0 ships the start images as they are
    lr: Positive = 0.05  # of Adam, in the reference normalization
    # `noise`: N(0, 1) in the reference normalization. `real_index`: image number `slot` of the class. `real_random`: a
    # seeded random image of the class. `real_median`: those whose loss at the logit teacher is nearest to the median of the
    # class (DELT). `real_kmeans`: those nearest to the `ipc` centers of the class in the features of the logit teacher.
    init: Literal["noise", "real_index", "real_random", "real_median", "real_kmeans", "mosaic"] = "real_random"
    # A batch holds consecutive classes of the same slot(s), or consecutive slots of the same class(es).
    batch_order: Literal["cross_class", "within_class"] = "cross_class"
    # With `cross_class`: how many consecutive slots share a batch, a teacher draw and an iteration count. The paper has 1;
    # few classes need more, since statistics of a handful of images mean little.
    slots_per_batch: Count = 1
    ladder: Ladder | None = None
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.5, 0.9)  # of Adam
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # `cosine`: to zero
    bn_weight: NonNegative = 0.01  # of the BN alignment against the classification loss (r_bn)
    # `sum` over layers, as published; `mean` over layers, so that deep teachers do not dominate; or `balanced`: the sum,
    # divided by what it is for the start images of the batch, so that no teacher does.
    bn_reduction: Literal["sum", "mean", "balanced"] = "sum"
    first_bn_multiplier: NonNegative = 10.0  # weight of each teacher's first BN layer
    view: SynthesisView = Field(default_factory=SynthesisView)
    clamp: bool = True  # to the valid pixel range after each step
    # The verifier is asked each this many iterations, at steps of ten, and at the end; it is only logged.
    verify_every: Count = 100
    # Share of the past in a moving average of the statistics that are matched; its gradient is that of the batch (straight
    # through). 0 is off; G-VBSM has 0.4.
    momentum: FractionBelowOne = 0.0
    conv: ConvStatistics | None = None
    densification: Densification | None = None  # needs several images of a class in a batch
    mosaic: Mosaic | None = None  # for init `mosaic`
    easiest: PositiveFraction = 1.0  # for init `real_kmeans`: only the images of the lowest loss at the logit teacher

    def __post_init__(self) -> None:
        if self.batch_order == "within_class" and self.slots_per_batch != 1:
            raise ValueError("slots_per_batch needs batch_order cross_class; leave it out")
        if (self.init == "mosaic") != (self.mosaic is not None):
            raise ValueError("mosaic belongs to init mosaic: set both (`mosaic: {}` takes RDED's values) or neither")
        if self.easiest != 1 and self.init != "real_kmeans":
            raise ValueError("easiest belongs to init real_kmeans; leave it out")
        if self.iterations == 0 and self.init == "noise":
            raise ValueError("iterations 0 ships the start images, and init is noise; take real images, or iterate")
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
