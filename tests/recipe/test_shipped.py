from pathlib import Path

import pytest
from pipeline import ROOT

from prism_hf.errors import RecipeError
from prism_hf.recipe import load_recipe, shipped_recipes, title_of


def test_every_recipe_of_the_checkout_is_shipped():
    files = {path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate"}
    assert set(shipped_recipes().values()) == files
    assert list(shipped_recipes()) == sorted(shipped_recipes())


def test_a_recipe_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in shipped_recipes().items():
        assert load_recipe(name) == load_recipe(path) == load_recipe(f"{name}.yaml")
        assert title_of(path)
        assert not title_of(path).startswith("#")


def test_a_file_takes_precedence_over_a_shipped_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    text = shipped_recipes()["digits/prism_ipc10"].read_text().replace("name: digits-prism-ipc10", "name: mine")
    Path("digits/prism_ipc10").write_text(text)
    assert load_recipe("digits/prism_ipc10").name == "mine"


@pytest.mark.parametrize("name", ["digits/prism_ipc100", "../recipes/digits/prism_ipc10", "accelerate/multi_gpu", "digits"])
def test_other_names_are_not_found(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="not found; give a YAML file, or a name that `prism-hf recipes` lists"):
        load_recipe(name)


def test_overrides_may_be_a_mapping():
    values = {"synthesis.ipc": 2, "synthesis.slots_per_batch": 1, "synthesis.batch_size": 10, "relabel.batch_size": 20}
    values |= {"data.source": Path("photos ü: x"), "evaluation.seeds": [5], "teachers.verifier": None, "name": "mine"}
    recipe = load_recipe("digits/prism_ipc10", values)
    assert (recipe.synthesis.ipc, recipe.evaluation.seeds, recipe.teachers.verifier) == (2, (5,), None)
    assert (recipe.data.source, recipe.name) == ("photos ü: x", "mine")
    with pytest.raises(RecipeError, match="unknown key 'synthesis.ipcs', did you mean 'ipc'"):
        load_recipe("digits/prism_ipc10", {"synthesis.ipcs": 2})
