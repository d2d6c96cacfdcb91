import pytest
from pipeline import ROOT

from prism_hf.cli.main import main, parse
from prism_hf.recipe import shipped_recipes


def test_recipes_lists_names_and_titles(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)


def test_recipes_prints_one_verbatim(capsys):
    assert main(["recipes", "digits/prism_ipc10"]) == 0
    assert capsys.readouterr().out == (ROOT / "recipes/digits/prism_ipc10.yaml").read_text()
    assert main(["recipes", "digits/nothing"]) == 2
    assert capsys.readouterr().err == (
        "RecipeError: 'digits/nothing' is not a shipped recipe; `prism-hf recipes` lists them\n"
    )


def test_a_recipe_in_place_of_a_command_runs_distillation(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["digits/prism_ipc10", "--dry-run"]) == 0
    by_name = capsys.readouterr().out
    assert main(["distill", str(ROOT / "recipes/digits/prism_ipc10.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == by_name
    assert main(["--dry-run", "synthesis.ipc=5", "digits/prism_ipc10"]) == 0
    assert "50 (5 per class)" in capsys.readouterr().out


def test_a_mistyped_command_is_not_mistaken_for_a_recipe(capsys):
    with pytest.raises(SystemExit):
        parse(["evalute", "x"])
    assert "invalid choice: 'evalute'" in capsys.readouterr().err
