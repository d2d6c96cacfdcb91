"""The sections of a recipe, except for the optimization of pixels. Each key is explained next to it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from PIL import ImageColor
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from .labels import Codec, Size
from .named_classes import NAMED_CLASSES

MOST = 2**31 - 1  # the tables store counts as int32
STRICT = ConfigDict(strict=True, extra="forbid")

Float = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[Float, Field(ge=0, lt=1)]
PositiveFraction = Annotated[Float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MOST)]
AtLeastTwo = Annotated[int, Field(ge=2, le=MOST)]
Index = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # the range of torch.manual_seed
Name = Annotated[str, Field(min_length=1)]
ClassPart = Literal["imagenette", "imagewoof", "imagenet-100"] | Annotated[tuple[Name | Index, ...], Field(min_length=2)]
NO_IMAGES = "none"
"""The source of a recipe that needs no real images."""


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"must be [smallest, largest], got {list(pair)}; swap the two values")
    return pair


CropScale = Annotated[tuple[PositiveFraction, PositiveFraction], AfterValidator(_ordered)]
"""The smallest and largest fraction of the area that a random resized crop keeps."""


def _opaque(color: str) -> str:
    try:
        opaque = len(ImageColor.getrgb(color)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        raise ValueError(f"must be an opaque color, got {color!r}; use a name such as `white`, or `#rrggbb`")
    return color


Color = Annotated[Name, AfterValidator(_opaque)]


def refuse_unused(section: Any, names: Iterable[str], why: str) -> None:
    """Raise a `ValueError` if a key that is not used differs from its default."""
    for name in names:
        default = type(section).__pydantic_fields__[name].get_default(call_default_factory=True)
        if getattr(section, name) != default:
            raise ValueError(f"{why}, so {name} is not used; remove it")


@dataclass(frozen=True, config=STRICT)
class DataRecipe:
    """The real dataset: its location, its columns, and the working size."""

    # `digits` (inside scikit-learn), a Hub id, a local folder (Parquet, ImageFolder, save_to_disk), or `none`: no real
    # images, only teachers, who name the classes; then there is no control, and no student is scored.
    source: Name
    num_classes: AtLeastTwo  # required, so that a plan can be made without the data; checked against the data
    size: Annotated[int, Field(ge=8, lt=2**15)]  # side of the square working image in pixels; the tables store int16
    channels: Literal[1, 3] = 3  # 1 (gray) or 3 (RGB) for the synthetic images
    # A part of the classes: names, WordNet ids or numbers, or `imagenette`, `imagewoof`, `imagenet-100`. `null`: all.
    classes: ClassPart | None = None
    # How teachers that know more classes are used. `restrict`: only with the logits of the part, so the softmax is over
    # it, and num_classes is its size. `full`: with all logits, those of the part first, and num_classes counts all.
    class_logits: Literal["restrict", "full"] = "restrict"
    config: Name | None = None  # Hub config of the source
    revision: Name | None = None  # Hub revision of the source; `null` uses the newest and records its commit
    train_split: Name = "train"  # for start images, squeeze, the random-real control and the diversity reference
    test_split: Name = "test"  # only for scoring students
    # For tuning: this stratified fraction of the *training* split replaces the test split, which is then never read.
    validation_fraction: FractionBelowOne = 0.0
    # For large sources: only this many training images of each class are used. A Hub source is streamed until there are
    # enough, and those are kept in the cache of `datasets`; of a folder of images, as many are drawn. Then there is no
    # row for all real images. `null`: all.
    images_per_class: Count | None = None
    image_column: Name | None = None  # `null` finds the only column of type Image, or else of image files as bytes
    label_column: Name | None = None  # `null` finds the only column of type ClassLabel, or else of integers or strings
    background: Color = "white"  # color behind transparent pixels, a name or `#rrggbb`
    # The value that means white in images with more than 8 bits, such as 4095 for 12 bits in 16-bit files. `null`: 65535
    # for 16-bit integers, 1.0 for floats; then 32-bit integers and 16-bit images that use at most 14 bits are refused.
    white_level: Positive | None = None
    license: Name = "unknown"  # license or terms of the source, for the card

    def __post_init__(self) -> None:
        if self.classes is not None:
            part, all_of_them = self.distilled_classes, self.num_classes
            if part > all_of_them or (part < all_of_them and self.class_logits == "restrict"):
                raise ValueError(f"classes has {part} classes, num_classes is {all_of_them}; set it to that")
        elif self.class_logits == "full":
            raise ValueError("class_logits belongs to classes; remove it, or set classes too")

    @property
    def distilled_classes(self) -> int:
        """The number of classes that get images: all, or the part in `classes`. Their labels are the first ones."""
        if self.classes is None:
            return self.num_classes
        return len(NAMED_CLASSES[self.classes] if isinstance(self.classes, str) else self.classes)

    @property
    def has_all_images(self) -> bool:
        """Whether all training images are read, which a student on all real images needs."""
        return self.source != NO_IMAGES and self.images_per_class is None

    @property
    def tested_on(self) -> str:
        """The images that students are scored on, as text for tables."""
        return "training images that were held out" if self.validation_fraction else "test images"


@dataclass(frozen=True, config=STRICT)
class TeachersRecipe:
    """The teachers of each loss, which PRISM decouples. An empty `bn_pool` gives SRe2L (one teacher for both losses).

    A teacher is `squeeze:<timm architecture>` (trained on this recipe's data), a timm name (`resnet18.tv_in1k`),
    `hf-hub:org/name@revision`, `local-dir:path`, or `transformers:org/name`. `squeeze:` and one of these names, except for
    transformers, fine-tunes that network on this recipe's data.
    """

    logit: Name  # the only teacher of the classification loss
    bn_pool: tuple[Name, ...] = ()  # other BN teachers, from which the extras are drawn
    include_logit: bool = True  # the logit teacher is always a BN teacher too (PRISM's published setting)
    extras: Index = 3  # maximum number of draws from the pool
    draw_probability: Fraction = 0.5  # of each draw; uniform, without replacement
    # `per_slot`: one draw per slot or group of slots that share a batch (paper: pre-distillation), or per batch if batches
    # are `within_class`. `per_iteration`: a new draw at each iteration (intra-distillation). `cycle` (G-VBSM): no draws;
    # the logit teacher and the pool take turns, and the teacher of an iteration gives both losses.
    selection: Literal["per_slot", "per_iteration", "cycle"] = "per_slot"
    verifier: Name | None = None  # a classifier outside logit teacher and pool that scores the images; never in the loss

    def __post_init__(self) -> None:
        if len(set(self.bn_pool)) != len(self.bn_pool):
            raise ValueError("bn_pool names a teacher twice; draws are without replacement, so name each once")
        if self.logit in self.bn_pool:
            raise ValueError(f"bn_pool contains the logit teacher {self.logit!r}; remove it there; see include_logit")
        if self.verifier in self.synthesis_names:
            raise ValueError(
                f"verifier {self.verifier!r} is also a teacher, but must be held out; name another architecture"
            )
        if not self.bn_pool and not self.include_logit:
            raise ValueError("no BN teacher: bn_pool is empty and include_logit is false; set one of the two")
        if self.selection == "cycle":
            refuse_unused(self, ("include_logit", "extras", "draw_probability"), "selection cycle draws no teachers")

    @property
    def synthesis_names(self) -> tuple[str, ...]:
        """The teachers in the loss."""
        return (self.logit, *self.bn_pool)

    @property
    def bn_candidates(self) -> tuple[str, ...]:
        """All BN teachers that may be drawn."""
        if self.selection == "cycle":
            return self.synthesis_names
        return ((self.logit,) if self.include_logit else ()) + (self.bn_pool if self.extras else ())


@dataclass(frozen=True, config=STRICT)
class SqueezeRecipe:
    """Training of the `squeeze:` teachers (SRe2L stage 1): AdamW, one-cycle learning rate, crops and pixel noise.

    Pretrained networks want fewer epochs and a lower learning rate, such as 5 and 1.0e-3.
    """

    epochs: Count = 14
    batch_size: AtLeastTwo = 64  # the incomplete last batch of an epoch is dropped (BN statistics)
    lr: Positive = 5.0e-3  # peak of the one-cycle schedule
    weight_decay: NonNegative = 0.05
    crop_scale: CropScale = (0.6, 1.0)
    flip: bool = False  # horizontally, with probability 0.5
    noise_std: NonNegative = 0.1  # largest standard deviation of Gaussian noise, in [0, 1] pixel units; drawn per image
    # Side of the input of teachers that start from pretrained weights: data.size, or that of these weights.
    input_size: Literal["recipe", "own"] = "recipe"
    # `running`: BN statistics as training leaves them, measured on images with pixel noise. `clean`: measured again at the
    # end, on one epoch of crops without noise, so that no part of the BN loss asks for noise.
    bn_statistics: Literal["running", "clean"] = "running"
    # `null` uses the recipe's seed. With a separate seed, recipes with different seeds can share their teachers.
    seed: Seed | None = None


@dataclass(frozen=True, config=STRICT)
class RelabelView:
    """The recorded views of the relabel stage. Each image has its own crop and flip."""

    crop_scale: CropScale = (0.25, 1.0)
    flip: bool = True  # horizontally, with probability 0.5
    mix: Literal["cutmix", "mixup", "none"] = "cutmix"  # `cutmix`: one box per batch; `mixup`: one weight per batch
    mix_alpha: Positive = 1.0  # both parameters of the Beta distribution of the mixing weight
    # For init `mosaic`: its `grid`. Then each view is a crop of one cell, drawn at random, so no crop shows parts of two
    # images (PCA, ICML 2026), and `crop_scale` is a fraction of the cell. The random-real control has no cells.
    cell: AtLeastTwo | None = None


@dataclass(frozen=True, config=STRICT)
class RelabelRecipe:
    """The teachers that label the shipped images, and the views they see."""

    teachers: Annotated[tuple[Name, ...], Field(min_length=1)]
    epochs: Count = 300  # views per image
    # How the logits of views are stored (docs/labels.md): `float16`; `int8` or `int4` bits per logit; `topk`: the `top_k`
    # highest, for the losses `kl` and `dist`; `seed`: not at all, the teachers compute them when a student trains.
    codec: Codec = "float16"
    top_k: Count | None = None
    # At most this many epochs are stored; students use them again for the other epochs (LPLD). `null`: all.
    stored_epochs: Count | None = None
    # Maximum size of the files of views, such as `150MB`; sets codec and stored_epochs (docs/labels.md).
    budget: Size | None = None
    batch_size: AtLeastTwo = 50  # part of the method, since mixing and norm balancing depend on the batch
    # `mean`: mean of the logits. `norm_balanced_mean`: each teacher's (B, K) logits are first rescaled to the mean
    # Frobenius norm of the teachers. `weighted`: weighted mean with `weights`.
    ensemble: Literal["mean", "norm_balanced_mean", "weighted"] = "norm_balanced_mean"
    weights: tuple[Positive, ...] | None = None  # one per teacher, for `weighted`; normalized to sum to 1
    view: RelabelView = Field(default_factory=RelabelView)

    @property
    def for_real_images(self) -> Self:
        """The same rules for whole images: without cells."""
        return replace(self, view=replace(self.view, cell=None))

    def __post_init__(self) -> None:
        if len(set(self.teachers)) != len(self.teachers):
            raise ValueError("relabel.teachers names a teacher twice; use ensemble weighted to give one more weight")
        if (self.ensemble == "weighted") != (self.weights is not None):
            raise ValueError("weights belong to ensemble weighted: set both or neither")
        if self.weights is not None and len(self.weights) != len(self.teachers):
            raise ValueError(f"{len(self.weights)} weights for {len(self.teachers)} teachers; give one weight each")
        if (self.codec == "topk") != (self.top_k is not None):
            raise ValueError("top_k belongs to codec topk: set both or neither")
        if self.budget is not None:
            refuse_unused(self, ("codec", "top_k", "stored_epochs"), "relabel.budget chooses how labels are stored")


@dataclass(frozen=True, config=STRICT)
class PackagingRecipe:
    """Encoding of the images and size of the table shards."""

    # `png` and `webp` (RGB only) are lossless. `jpeg` is not: the teachers label the decoded JPEG images.
    image_format: Literal["png", "webp", "jpeg"] = "png"
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    shard_megabytes: Count = 500  # a new Parquet file starts when the last one has reached this size


@dataclass(frozen=True, config=STRICT)
class EvaluationRecipe:
    """Training of the students from scratch, with the same protocol for every row of the table."""

    student: Name  # timm architecture, or `transformers:<model type>` for a default configuration of that family
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)  # one student per seed and row
    # A published protocol, which sets all values below that the recipe does not set itself: `prism`; `rd3` (ICLR 2026);
    # `cda` (as in rethinkdc). See recipe/presets.py. The resolved recipe has every value.
    preset: Literal["prism", "rd3", "cda"] | None = None
    batch_size: AtLeastTwo = 50
    micro_batch: AtLeastTwo | None = None  # images per forward pass, whose gradients are added up; `null`: the batch
    epochs: Count | None = None  # each uses one recorded epoch of views; `null` uses every epoch in the folder once
    # The number of recorded epochs of views to cycle through; fewer need less storage. `null`: as many as `epochs`.
    label_epochs: Count | None = None
    # The number of epochs in the middle of training that use hard labels with label smoothing, on views of their own that
    # need no storage (HALD). The others use the stored labels.
    hard_epochs: Index = 0
    # `mse_ce`: MSE(student logits, stored logits) + ce_weight * CE. `kl`: KL at `temperature`. `dist`: correlations between
    # classes and between images at `temperature`. `cosine`: 1 - cosine of the centered logits, plus ce_weight * CE.
    loss: Literal["mse_ce", "kl", "dist", "cosine"] = "mse_ce"
    ce_weight: NonNegative = 0.1
    temperature: Positive = 20.0
    optimizer: Name = "adamw"  # a name that timm's factory knows, such as `adam`, `muon` or `lion`; for all students alike
    lr: Positive = 1.0e-3  # cosine decay, no jump
    # The cosine is as long as this multiple of the training: 1 decays to zero, 2 to half of `lr` (EDC, RD3).
    cosine_stretch: Annotated[Float, Field(ge=1)] = 1.0
    weight_decay: NonNegative = 0.01  # not applied to one-dimensional parameters
    ema: FractionBelowOne = 0.0  # decay of an exponential moving average of the student's weights; 0 turns it off
    # Epochs of the ceiling row (all real training images, hard labels); 0 omits the row, and the table says so.
    full_data_epochs: Index = 20

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ, got {list(self.seeds)}")
