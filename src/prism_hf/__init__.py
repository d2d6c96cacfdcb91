"""Diverse dataset distillation with the Hugging Face stack: one recipe leaves one dataset that explains itself.

Names are imported when first used, so that reading a recipe or printing a plan does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dataset.reader import DistilledDataset, load_distilled
    from .dataset.writer import build_dataset
    from .evaluation.diversity import intra_class_similarity
    from .evaluation.students import train_student
    from .hub.dataset_card import render_card
    from .hub.push import push_folder
    from .method.alignment import Alignment
    from .method.relabel import relabel_epoch
    from .method.synthesis import synthesize
    from .models.load import load_teachers
    from .models.teacher import Teacher
    from .recipe.plan import SynthesisJob, plan_jobs
    from .recipe.schema import Recipe
    from .recipe.yaml_file import load_recipe
    from .run.distill import distill

__version__ = "0.1.0"
_HOME = {
    "Alignment": "method.alignment",
    "DistilledDataset": "dataset.reader",
    "Recipe": "recipe.schema",
    "SynthesisJob": "recipe.plan",
    "Teacher": "models.load",
    "build_dataset": "dataset.writer",
    "distill": "run.distill",
    "intra_class_similarity": "evaluation.diversity",
    "load_distilled": "dataset.reader",
    "load_recipe": "recipe.yaml_file",
    "load_teachers": "models.load",
    "plan_jobs": "recipe.plan",
    "push_folder": "hub.push",
    "relabel_epoch": "method.relabel",
    "render_card": "hub.dataset_card",
    "synthesize": "method.synthesis",
    "train_student": "evaluation.students",
}
__all__ = [
    "Alignment",
    "DistilledDataset",
    "Recipe",
    "SynthesisJob",
    "Teacher",
    "build_dataset",
    "distill",
    "intra_class_similarity",
    "load_distilled",
    "load_recipe",
    "load_teachers",
    "plan_jobs",
    "push_folder",
    "relabel_epoch",
    "render_card",
    "synthesize",
    "train_student",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
