"""The budget of labels: what it chooses, and that the files stay below it."""

import re
from pathlib import Path

import pytest
from each import each
from pipeline import small_set, tiny

from prism_hf.errors import RecipeError
from prism_hf.recipe import StoredLabels, describe_plan, load_recipe
from prism_hf.recipe.labels import within_budget

IMAGENET = {"images": 10_000, "num_classes": 1000, "epochs": 300, "temperature": 20.0}


def chosen(budget):
    labels = within_budget(budget, **IMAGENET)
    return labels.codec, labels.epochs


def test_the_richest_codec_that_fits_all_epochs_is_chosen_and_then_fewer_epochs():
    assert chosen("7GB") == ("float16", 300)
    assert chosen("4GB") == ("int8", 300)
    assert chosen("1.7 GB") == ("int4", 300)
    assert chosen("150MB") == ("int4", 27)
    assert chosen("6000kB") == ("int4", 1)


def test_a_budget_for_less_than_one_epoch_says_how_much_one_needs():
    with pytest.raises(ValueError, match=r"10,000 images of 1000 classes need 5\.41 MB with int4"):
        chosen("5MB")


def test_a_recipe_stores_what_it_says():
    assert tiny("relabel.codec=int8").stored_labels == StoredLabels("int8", 2, None, 20.0)
    assert tiny("relabel.stored_epochs=9").stored_labels.epochs == 2
    assert tiny("relabel.stored_epochs=1").stored_labels == StoredLabels("float16", 1, None, 20.0)
    with pytest.raises(RecipeError, match="does not hold one epoch"):
        tiny("relabel.budget=1kB")


@each(
    "classes, ipc, epochs, budget", [(4, 3, 40, "60kB"), (10, 10, 30, "50kB"), (300, 2, 12, "900kB"), (300, 2, 12, "1.4MB")]
)
def test_the_files_stay_below_the_budget(tmp_path, classes, ipc, epochs, budget):
    recipe, *_ = small_set(tmp_path, classes=classes, ipc=ipc, epochs=epochs, overrides=[f"relabel.budget={budget}"])
    size = sum(path.stat().st_size for path in (tmp_path / "views").iterdir())
    allowed = float(budget[:-2]) * (1e3 if "k" in budget else 1e6)
    assert size <= allowed
    assert size >= 0.3 * allowed or recipe.stored_labels.epochs == epochs


RECIPES = Path(__file__).parents[2] / "recipes"


@each("path", sorted(RECIPES.glob("imagenet/*.yaml")))
def test_the_dry_run_of_each_imagenet_recipe_has_jobs_iterations_hours_and_bytes(path):
    plan = describe_plan(load_recipe(path))
    lines = {line.split()[0]: line for line in plan.splitlines()[1:]}
    assert {"jobs", "steps", "bytes", "disk", "relabel"} <= lines.keys()
    header = re.search(r"estimate: ([\d.]+) hours", path.read_text(encoding="utf-8"))
    hours = re.search(r"([\d.]+) hours of synthesis on one H200", lines.get("GPU", ""))
    if header:
        assert float(hours[1]) == pytest.approx(float(header[1]), rel=0.1, abs=0.05), "the header says the same"
    assert (hours is None) == ("random" in path.name)
