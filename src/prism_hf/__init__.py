"""Diverse dataset distillation with the Hugging Face stack: one recipe leaves one data set that explains itself."""

from .alignment import BNAlignment
from .card import render_card
from .diversity import Diversity, intra_class_similarity
from .packaging import DistilledDataset, build_dataset, load_distilled
from .plan import SynthesisJob, plan_jobs
from .recipe import Recipe, load_recipe
from .relabel import relabel_epoch
from .students import train_student
from .synthesis import synthesize
from .teachers import Teacher, load_teachers

__all__ = [
    "BNAlignment",
    "DistilledDataset",
    "Diversity",
    "Recipe",
    "SynthesisJob",
    "Teacher",
    "build_dataset",
    "intra_class_similarity",
    "load_distilled",
    "load_recipe",
    "load_teachers",
    "plan_jobs",
    "relabel_epoch",
    "render_card",
    "synthesize",
    "train_student",
]
__version__ = "0.1.0"
