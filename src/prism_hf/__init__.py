"""Diverse dataset distillation with Hugging Face: turn a labeled dataset into a few synthetic images with soft labels.

Names are imported on first use, so that reading a recipe or printing a plan does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dataset import DistilledDataset, load_distilled
    from .evaluation import intra_class_similarity, train_student
    from .hub import Target, push_folder
    from .method import Alignment, relabel_epoch, synthesize
    from .models import Teacher, load_teachers
    from .recipe import Recipe, SynthesisJob, load_recipe, plan_jobs
    from .run.distill import distill

__version__ = "0.1.0"
__all__ = [
    "Alignment", "DistilledDataset", "Recipe", "SynthesisJob", "Target", "Teacher", "distill", "intra_class_similarity",
    "load_distilled", "load_recipe", "load_teachers", "plan_jobs", "push_folder", "relabel_epoch", "synthesize",
    "train_student",
]  # fmt: skip
_NAMES = {
    "dataset": ("DistilledDataset", "load_distilled"),
    "evaluation": ("intra_class_similarity", "train_student"),
    "hub": ("Target", "push_folder"),
    "method": ("Alignment", "relabel_epoch", "synthesize"),
    "models": ("Teacher", "load_teachers"),
    "recipe": ("Recipe", "SynthesisJob", "load_recipe", "plan_jobs"),
    "run.distill": ("distill",),
}


def __getattr__(name: str) -> object:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
