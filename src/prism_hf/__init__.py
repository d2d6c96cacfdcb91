"""Diverse dataset distillation with the Hugging Face stack: one recipe leaves one data set that explains itself.

Names are imported when first used, so that reading a recipe or printing a plan does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .alignment import BNAlignment
    from .card import render_card
    from .diversity import intra_class_similarity
    from .hub import push_folder
    from .packaging import build_dataset
    from .plan import SynthesisJob, plan_jobs
    from .reading import DistilledDataset, load_distilled
    from .recipe import Recipe
    from .recipe_file import load_recipe
    from .relabel import relabel_epoch
    from .students import train_student
    from .synthesis import synthesize
    from .teachers import Teacher, load_teachers

__version__ = "0.1.0"
_HOME = {
    "BNAlignment": "alignment",
    "DistilledDataset": "reading",
    "Recipe": "recipe",
    "SynthesisJob": "plan",
    "Teacher": "teachers",
    "build_dataset": "packaging",
    "intra_class_similarity": "diversity",
    "load_distilled": "reading",
    "load_recipe": "recipe_file",
    "load_teachers": "teachers",
    "plan_jobs": "plan",
    "push_folder": "hub",
    "relabel_epoch": "relabel",
    "render_card": "card",
    "synthesize": "synthesis",
    "train_student": "students",
}
__all__ = [
    "BNAlignment",
    "DistilledDataset",
    "Recipe",
    "SynthesisJob",
    "Teacher",
    "build_dataset",
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
