"""Recipes: what is distilled, and how, in frozen dataclasses that check their values on creation.

A recipe contains the science (every value that can change a result) and nothing about hardware: process count, threads,
device, precision and paths are arguments of the commands. Two runs of one recipe give the same bytes on the CPU.
"""

import dataclasses
import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .labels import StoredLabels, within_budget
from .sections import (
    NO_IMAGES,
    STRICT,
    DataRecipe,
    EvaluationRecipe,
    PackagingRecipe,
    RelabelRecipe,
    Seed,
    SqueezeRecipe,
    TeachersRecipe,
    refuse_unused,
)
from .synthesis import SynthesisRecipe

SQUEEZE_PREFIX = "squeeze:"
TOP_K_LOSSES = ("kl", "dist")
"""Losses that compare probabilities, which a label has even if most of its logits are not stored."""
MOST_IMAGES = 10**7  # a plan lists every image
_SQUEEZED = re.compile(rf"{SQUEEZE_PREFIX}(\w+(\.\w+)?|(hf-hub|hf_hub|local-dir):.+)")
_RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d", re.IGNORECASE)
"""Names that Windows reserves for devices, with any extension."""


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """The recipe of one distilled dataset, from the source to the results table. Each section is a separate class.

    Attributes:
        name: Name of the run and of its default output folder.
        method: `synthesize`, or `random` (real images drawn at random, not optimized, but relabeled and packaged as usual).
        seed: Seed of every random draw except those of the students.

    Example:
        >>> recipe = load_recipe("recipes/digits/prism_ipc10.yaml", ["synthesis.iterations=20"])
        >>> recipe.synthesis.ipc
        10
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
    data: DataRecipe
    teachers: TeachersRecipe
    synthesis: SynthesisRecipe
    relabel: RelabelRecipe
    evaluation: EvaluationRecipe
    method: Literal["synthesize", "random"] = "synthesize"
    seed: Seed = 0
    squeeze: SqueezeRecipe = Field(default_factory=SqueezeRecipe)
    packaging: PackagingRecipe = Field(default_factory=PackagingRecipe)

    def __post_init__(self) -> None:
        _check_names(self)
        _check_unused(self)
        _check_labels(self)
        _check_counts(self)

    @property
    def num_images(self) -> int:
        """The number of distilled images."""
        return self.synthesis.ipc * self.data.distilled_classes

    @property
    def stored_labels(self) -> StoredLabels:
        """How the labels of views are stored, as set by hand or by the budget."""
        rule, temperature = self.relabel, self.evaluation.temperature
        if rule.budget is None:
            return StoredLabels(rule.codec, min(rule.stored_epochs or rule.epochs, rule.epochs), rule.top_k, temperature)
        counts = {"images": self.num_images, "num_classes": self.data.num_classes, "epochs": rule.epochs}
        return within_budget(rule.budget, **counts, temperature=temperature)

    @property
    def squeezed_teachers(self) -> tuple[str, ...]:
        """The `squeeze:` teachers, without duplicates, in order of first mention."""
        return tuple(name for name in self.all_teachers if name.startswith(SQUEEZE_PREFIX))

    @property
    def all_teachers(self) -> tuple[str, ...]:
        """All networks of the recipe, without duplicates: logit teacher, pool, labelers, verifier."""
        verifier = (self.teachers.verifier,) if self.teachers.verifier else ()
        return tuple(dict.fromkeys((*self.teachers.synthesis_names, *self.relabel.teachers, *verifier)))

    @property
    def bn_candidates(self) -> tuple[str, ...]:
        """All BN teachers that may be drawn; none if nothing is optimized."""
        return () if self.method == "random" else self.teachers.bn_candidates

    def fingerprint(self, *sections: str) -> str:
        """Return 16 hex digits of the SHA-256 of the recipe's values, or of the named sections and the seed.

        The name is excluded, since renaming a recipe changes no result. Keys that a later version added are excluded if
        they have their default, which is what earlier versions did. So published recipes keep their fingerprints.
        """
        values = to_dict(self)
        values["data"]["licence"] = values["data"].pop("license")  # the spelling of the key in the first version
        for key, default in _ADDED.items():
            *parents, last = key.split(".")
            section = values
            for parent in parents:
                section = section.get(parent) or {}
            if section.get(last, ...) == default:
                del section[last]
        chosen = {*sections, "seed"} if sections else values.keys() - {"name"}
        text = json.dumps({key: value for key, value in values.items() if key in chosen}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_names(recipe: Recipe) -> None:
    if _RESERVED.fullmatch(recipe.name.split(".")[0]) or recipe.name.endswith("."):
        raise ValueError(f"name {recipe.name!r} is not a valid folder name on every operating system; choose another one")
    for name in recipe.squeezed_teachers:
        if not _SQUEEZED.fullmatch(name):
            raise ValueError(
                f"teacher {name!r} is not squeeze:ARCHITECTURE, or squeeze: and a pretrained timm name, hf-hub:ORG/NAME or "
                "local-dir:PATH"
            )


def _check_unused(recipe: Recipe) -> None:
    if recipe.method == "random":
        for section, used in ((recipe.synthesis, ("ipc",)), (recipe.teachers, ("logit", "verifier"))):
            unused = [field.name for field in dataclasses.fields(section) if field.name not in used]
            refuse_unused(section, unused, "method random optimizes nothing")
    if recipe.data.source == NO_IMAGES:
        _check_no_images(recipe)
    if recipe.packaging.image_format == "webp" and recipe.data.channels == 1:
        raise ValueError("packaging.image_format webp has no gray mode, and data.channels is 1; use png")


def _check_labels(recipe: Recipe) -> None:
    """Refuse labels that do not fit their budget, or that the loss of students cannot use."""
    assert recipe.stored_labels.epochs  # a budget that is too small raises an error here
    relabel, evaluation, classes = recipe.relabel, recipe.evaluation, recipe.data.num_classes
    _check_cell(recipe)
    if relabel.top_k is not None and relabel.top_k >= classes:
        raise ValueError(f"relabel.top_k is {relabel.top_k}, data.num_classes is {classes}; lower it, or use codec float16")
    if relabel.codec == "topk" and evaluation.loss not in TOP_K_LOSSES:
        raise ValueError(
            f"relabel.codec topk keeps only the highest logits, but evaluation.loss {evaluation.loss} compares all; "
            "use int8 or int4, or the loss kl or dist"
        )
    epochs = evaluation.epochs or relabel.epochs
    if evaluation.hard_epochs >= epochs:
        raise ValueError(
            f"evaluation.hard_epochs is {evaluation.hard_epochs}, but a student trains for {epochs} epochs; lower it"
        )


def _check_cell(recipe: Recipe) -> None:
    cell, mosaic = recipe.relabel.view.cell, recipe.synthesis.mosaic
    if cell is None:
        return
    if mosaic is None or mosaic.grid != cell:
        grid = "there is no synthesis.mosaic" if mosaic is None else f"synthesis.mosaic.grid is {mosaic.grid}"
        raise ValueError(f"relabel.view.cell is {cell}, but {grid}; set both to the same number, or cell to null")
    if recipe.data.size % cell:
        raise ValueError(f"relabel.view.cell is {cell}, which does not divide data.size {recipe.data.size}; change one")
    if recipe.evaluation.hard_epochs:
        raise ValueError("evaluation.hard_epochs draws views of whole images; remove it, or set relabel.view.cell to null")


def _check_no_images(recipe: Recipe) -> None:
    """Refuse everything that needs real images in a recipe without any."""
    synthesis, teachers = recipe.synthesis, recipe.squeezed_teachers
    uses = {
        "method random ships real images": recipe.method == "random",
        f"teacher {teachers[0] if teachers else ''} is trained on them; name pretrained teachers": bool(teachers),
        f"synthesis.init {synthesis.init} starts from them; use noise": synthesis.init != "noise",
        "synthesis.conv compares with their statistics; remove it": synthesis.conv is not None,
        "data.validation_fraction holds some of them out; remove it": recipe.data.validation_fraction > 0,
    }
    for use, found in uses.items():
        if found:
            raise ValueError(f"data.source is none, so there are no real images, but {use}")


def _check_counts(recipe: Recipe) -> None:
    """Refuse values that exceed the number of images or epochs. One error names every value to change."""
    synthesis, images, stored = recipe.synthesis, recipe.num_images, recipe.relabel.epochs
    if images > MOST_IMAGES:
        raise ValueError(
            f"synthesis.ipc {synthesis.ipc} makes {images} images; expected at most {MOST_IMAGES:,}; lower ipc"
        )
    wanted: dict[str, int | None] = {"relabel.batch_size": min(recipe.relabel.batch_size, images)}
    if recipe.data.images_per_class is not None:
        wanted["data.images_per_class"] = max(recipe.data.images_per_class, synthesis.ipc)
    if recipe.method == "synthesize":
        wanted = _fitting_batches(recipe) | wanted
    epochs = "label_epochs" if recipe.evaluation.label_epochs else "epochs"
    if recipe.evaluation.label_epochs:
        stored, most = recipe.stored_labels.epochs, recipe.stored_labels.epochs
    else:
        most = stored + recipe.evaluation.hard_epochs
    wanted[f"evaluation.{epochs}"] = min(getattr(recipe.evaluation, epochs) or 0, most) or None
    values = to_dict(recipe)
    present = {key: values[key.split(".")[0]][key.split(".")[1]] for key in wanted}
    wrong = [key for key, value in wanted.items() if value != present[key]]
    if not wrong:
        return
    found = [key if isinstance(present[key], dict) else f"{key} is {present[key]}" for key in wrong]
    if (wanted.get("synthesis.slots_per_batch") or 0) > synthesis.slots_per_batch:
        limit = synthesis.slots_per_batch * recipe.data.distilled_classes
        found[0] = f"synthesis.batch_size is {synthesis.batch_size}, more than the {limit} images of slots_per_batch"
    too_long = found.pop() + f" but relabel stores {stored} epochs of views" if wrong[-1].startswith("evaluation") else ""
    too_many = f"{', '.join(found)} but there are {images} images ({synthesis.ipc} per class)" if found else ""
    fixes = " ".join(f"{key}={'null' if wanted[key] is None else wanted[key]}" for key in wrong)
    hint = ", or raise relabel.epochs" if too_long else ""
    raise ValueError(f"{'; '.join(filter(None, (too_many, too_long)))}; set {fixes}{hint}")


def _fitting_batches(recipe: Recipe) -> dict[str, int | None]:
    """Return values of the synthesis that fit the number of images; those that fit already are unchanged."""
    synthesis, classes = recipe.synthesis, recipe.data.distilled_classes
    if synthesis.batch_order == "within_class":
        return {"synthesis.batch_size": min(synthesis.batch_size, recipe.num_images)}
    slots, size = synthesis.slots_per_batch, synthesis.batch_size
    if size > slots * classes and not synthesis.ladder:  # a ladder has one slot
        slots = -(-size // classes)  # keeps the batch, whose statistics are the loss
    slots = min(slots, synthesis.ipc)
    fitting: dict[str, int | None] = {
        "synthesis.slots_per_batch": slots,
        "synthesis.batch_size": min(size, slots * classes),
    }
    if slots == 1 and synthesis.densification is not None:
        fitting["synthesis.densification"] = None  # it compares images of one class
    return fitting


_ADDED: dict[str, object] = {
    "method": "synthesize",
    "data.background": "white",
    "data.white_level": None,
    "data.classes": None,
    "data.class_logits": "restrict",
    "data.images_per_class": None,
    "relabel.codec": "float16",
    "relabel.top_k": None,
    "relabel.stored_epochs": None,
    "relabel.budget": None,
    "squeeze.seed": None,
    "squeeze.bn_statistics": "running",
    "squeeze.input_size": "recipe",
    "synthesis.momentum": 0.0,
    "synthesis.conv": None,
    "synthesis.densification": None,
    "synthesis.mosaic.easiest": None,
    "synthesis.mosaic": None,
    "relabel.view.cell": None,
    "synthesis.easiest": 1.0,
    "synthesis.view.curriculum": "none",
    "evaluation.label_epochs": None,
    "evaluation.hard_epochs": 0,
    "evaluation.preset": None,
    "evaluation.micro_batch": None,
    "evaluation.optimizer": "adamw",
    "evaluation.cosine_stretch": 1.0,
}
"""Keys that did not exist in the first version, with their defaults."""


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as plain YAML types."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))
