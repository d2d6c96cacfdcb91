"""Helpers for tests of comparisons: a tiny comparison that runs in this process."""

from accelerate.state import AcceleratorState
from pipeline import tiny

from prism_hf.compare.comparison import Comparison, StudentSetup
from prism_hf.compare.findings import findings
from prism_hf.compare.methods import under_one_protocol
from prism_hf.run.context import make_accelerator

STUDENTS = ("test_byobnet", "test_efficientnet")
LIGHT = ("evaluation.seeds=[0,1]", "evaluation.full_data_epochs=0")
RECIPES = {"prism": (), "sre2l": ("teachers.bn_pool=[]",), "bad": ("synthesis.lr=1.0e30", "synthesis.clamp=false")}


def named(*names):
    return [(name, tiny(*LIGHT, *RECIPES.get(name, ()), f"name={name}")) for name in names]


def comparison(folder, teachers, recipes, *, seeds=(0, 1), students=STUDENTS):
    """Return a comparison as the command creates it, before it runs."""
    AcceleratorState._reset_state(True)
    methods, _ = under_one_protocol(recipes)
    readings = [StudentSetup(student, labels) for student in students for labels in ("soft", "hard")]
    return Comparison(methods, readings, list(seeds), folder=folder, teachers_root=teachers, accelerator=make_accelerator())


def facts_of(made, failed=()):
    """Return the content that comparison.json would have for this comparison."""
    return findings(made, dict(failed), notes=[], command="")[0]
