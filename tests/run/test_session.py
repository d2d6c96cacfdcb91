import shutil
from pathlib import Path

import pytest
from pipeline import mtimes, one_line, stages, tiny
from safetensors.torch import load_file, save_file

from prism_hf.errors import DamagedError, OutputError, StageError, TeacherError
from prism_hf.models.squeeze import teacher_folder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAME = "squeeze:test_efficientnet"


@pytest.fixture
def teachers(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run / "teachers", tmp_path / "teachers"))


def test_the_check_writes_nothing_and_loads_no_squeezed_teacher(tmp_path):
    made = stages(tmp_path / "run", tmp_path / "teachers")
    before = mtimes(tmp_path)
    made.check()
    assert mtimes(tmp_path) == before
    assert not (tmp_path / "teachers").exists()


def test_data_and_teachers_are_loaded_once(finished_run):
    made = stages(finished_run, finished_run / "teachers")
    assert made.data is made.data
    assert made.teachers([NAME])[NAME] is made.teachers([NAME, "squeeze:test_byobnet"])[NAME]
    assert made.verifier() is None
    assert made.work is made.work


def test_a_teacher_that_is_missing_says_which_stage_makes_it(tmp_path):
    with pytest.raises(StageError) as error:
        stages(tmp_path / "run", tmp_path / "teachers").teachers([NAME])
    assert "--stage squeeze" in one_line(error)
    assert NAME in one_line(error)


def test_changed_weights_of_a_teacher_are_noticed_before_it_teaches(teachers, tmp_path):
    path = teacher_folder(NAME, tiny(), teachers) / "model.safetensors"
    weights = load_file(path)
    weights["conv_stem.weight"][0, 0, 0, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DamagedError) as error:
        stages(tmp_path / "run", teachers).teachers([NAME])
    assert "changed after" in one_line(error)


def test_changed_weights_are_trained_again_by_their_stage(finished_run, teachers, tmp_path, caplog):
    folder = teacher_folder(NAME, tiny(), teachers)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    stages(tmp_path / "run", teachers)(("squeeze",))
    assert f"set aside as {folder.name}.aside-1, it is trained again" in caplog.text
    assert (teachers / f"{folder.name}.aside-1" / "model.safetensors").is_file()
    whole = teacher_folder(NAME, tiny(), finished_run / "teachers")
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_inputs_that_changed_are_noticed_unless_the_run_is_moved_aside(finished_run, tmp_path):
    made = stages(tmp_path / "run", finished_run / "teachers")
    made.check()
    made.record_inputs()
    made.check()
    path = tmp_path / "run" / "work" / "inputs.json"
    path.write_text(path.read_text().replace(made.data.train.content, "0"))
    with pytest.raises(OutputError, match="have changed"):
        made.check()
    made.check(fresh=True)


def test_a_batch_of_more_images_than_there_are_is_found_before_any_work(tmp_path):
    with pytest.raises(TeacherError, match="1347"):
        stages(tmp_path / "run", tmp_path / "teachers", "squeeze.batch_size=2000").check()


def test_keys_change_with_what_a_file_is_made_from(finished_run):
    plain = stages(finished_run, finished_run / "teachers").work
    for override, same in (("synthesis.lr=0.5", False), ("relabel.epochs=9", True), ("name=other", True)):
        other = stages(finished_run, finished_run / "teachers", override).work
        assert (other.synthesis_key == plain.synthesis_key) == same, override
    stages(finished_run, finished_run / "teachers")


def test_the_score_of_each_squeezed_teacher_is_known(finished_run):
    scores = stages(finished_run, finished_run / "teachers").squeezed_top1()
    assert set(scores) == {NAME, "squeeze:test_byobnet"}
    assert all(0 <= value <= 1 for value in scores.values())
