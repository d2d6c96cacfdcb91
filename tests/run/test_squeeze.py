"""The stage squeeze and the teachers that it provides to the other stages."""

import json
import shutil
from pathlib import Path

import pytest
from pipeline import mtimes, one_line, run_in, tiny
from safetensors.torch import load_file, save_file

from prism_hf.errors import DamagedError, StageError
from prism_hf.models.squeeze import squeeze_operations, teacher_folder
from prism_hf.run.distill import run_stages

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAME = "squeeze:test_efficientnet"


@pytest.fixture
def teachers(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run / "teachers", tmp_path / "teachers"))


def test_the_error_for_a_missing_teacher_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(StageError) as error:
        run_in(tmp_path / "run", tmp_path / "teachers").teachers([NAME])
    assert "--stage squeeze" in one_line(error)
    assert NAME in one_line(error)


def test_changed_weights_of_a_teacher_are_detected_before_use(teachers, tmp_path):
    path = teacher_folder(NAME, tiny(), teachers) / "model.safetensors"
    weights = load_file(path)
    weights["conv_stem.weight"][0, 0, 0, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DamagedError) as error:
        run_in(tmp_path / "run", teachers).teachers([NAME])
    assert "changed after" in one_line(error)


def test_the_stage_squeeze_retrains_changed_weights(finished_run, teachers, tmp_path, caplog):
    folder, other = (teacher_folder(name, tiny(), teachers) for name in (NAME, "squeeze:test_byobnet"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    before = mtimes(other)
    with caplog.at_level("INFO", "prism_hf"):
        run_stages(run_in(tmp_path / "run", teachers), ("squeeze",))
    assert f"set aside as {folder.name}.aside-1, to be recreated" in caplog.text
    assert "squeeze: 1 of 2 teachers done, 1 to do" in caplog.text
    assert (teachers / f"{folder.name}.aside-1" / "model.safetensors").is_file()
    whole = teacher_folder(NAME, tiny(), finished_run / "teachers")
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert mtimes(other) == before


def test_the_score_of_each_squeezed_teacher_is_returned(finished_run):
    run = run_in(finished_run, finished_run / "teachers")
    scores = run.squeezed_top1
    assert set(scores) == {NAME, "squeeze:test_byobnet"}
    assert all(0 <= value <= 1 for value in scores.values())
    assert json.loads((finished_run / "work" / "squeezed.json").read_text()) == scores


def test_the_teacher_that_takes_longest_is_trained_first():
    """All take the same number of steps; what a step costs differs several times."""
    costs = {name: squeeze_operations(tiny(), f"squeeze:{name}") for name in ("test_byobnet", "resnet18", "resnet34")}
    assert 0 < costs["test_byobnet"] < costs["resnet18"] < 0.6 * costs["resnet34"]
