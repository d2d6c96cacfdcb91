import dataclasses
import json
import os

import pytest
from accelerate.state import AcceleratorState
from conftest import make_teacher
from each import each
from pipeline import mtimes, one_line, run_in, save_timm, tiny

from prism_hf.errors import OutputError, RecipeError, StageError, TeacherError
from prism_hf.recipe import cache_needed
from prism_hf.run.context import Run, make_accelerator
from prism_hf.run.preflight import (
    check,
    check_apart,
    check_architectures,
    check_space,
    check_stage,
    check_verifier,
    missing_space,
    record_inputs,
)


def named(name, architecture="test_byobnet"):
    return dataclasses.replace(make_teacher(architecture, num_classes=10), name=name)


def test_a_verifier_of_another_architecture_passes():
    check_verifier(tiny("teachers.verifier=squeeze:test_resnet"), {})
    check_verifier(tiny("teachers.verifier=null"), {})


@pytest.mark.parametrize("role", ["logit", "bn_pool"])
def test_a_verifier_must_not_share_an_architecture_in_the_loss(role):
    architecture = {"logit": "test_byobnet", "bn_pool": "test_efficientnet"}[role]
    recipe = tiny("teachers.verifier=local-dir:somewhere")
    with pytest.raises(RecipeError, match=f"has the architecture of teacher 'squeeze:{architecture}'"):
        check_verifier(recipe, {"local-dir:somewhere": named("local-dir:somewhere", architecture)})


def test_a_verifier_needs_a_linear_classifier():
    judge = named("local-dir:x", "test_resnet")
    judge.model.fc = None
    with pytest.raises(TeacherError, match="no linear classifier"):
        check_verifier(tiny("teachers.verifier=local-dir:x"), {"local-dir:x": judge})


@each("overrides, fix", [
    (["teachers.verifier=squeeze:dpn48b"], "name another verifier"),
    (["teachers.verifier=null", "teachers.logit=squeeze:dpn48b"], "set teachers.verifier to a network that has one"),
])  # fmt: skip
def test_another_verifier_is_asked_for_only_if_one_was_named(overrides, fix):
    with pytest.raises(TeacherError) as error:
        check_architectures(tiny(*overrides))
    assert str(error.value).endswith(fix)


# -- the whole check --------------------------------------------------------------------------------------------------


def test_the_check_writes_nothing_and_loads_no_squeezed_teacher(tmp_path):
    run = run_in(tmp_path / "run", tmp_path / "teachers")
    before = mtimes(tmp_path)
    check(run)
    assert mtimes(tmp_path) == before
    assert not (tmp_path / "teachers").exists()
    assert run.loaded.teachers == {}


def test_a_batch_larger_than_the_dataset_is_reported_before_any_work(tmp_path):
    with pytest.raises(TeacherError, match="1347"):
        check(run_in(tmp_path / "run", tmp_path / "teachers", "squeeze.batch_size=2000"))


def test_an_invalid_teachers_folder_is_reported_before_any_work(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError) as error:
        check(run_in(tmp_path / "run", tmp_path / "file"))
    assert "--teachers" in one_line(error)


def test_an_output_inside_the_data_is_refused(tmp_path):
    """The next launch would read the output as data."""
    (tmp_path / "data").mkdir()
    for folder in (tmp_path / "data", tmp_path / "data" / "deep" / "run"):
        with pytest.raises(OutputError) as error:
            check_apart(folder, str(tmp_path / "data"))
        assert "inside the data" in one_line(error)
    check_apart(tmp_path / "data2", str(tmp_path / "data"))
    check_apart(tmp_path / "run", "digits")


@pytest.mark.parametrize(
    ("stage", "folder", "word"),
    [
        ("squeeze", False, None), ("synthesize", False, "--stage squeeze"), ("relabel", False, "--stage synthesize"),
        ("package", False, "--stage relabel"), ("evaluate", False, "--stage package"), ("relabel", True, "--stage squeeze"),
    ],
)  # fmt: skip
def test_a_stage_requires_the_stages_before_it(tmp_path, stage, folder, word):
    run = run_in(tmp_path / "run", tmp_path / "teachers")
    if not folder:
        (run.folder / "recipe.yaml").unlink()
    if word is None:
        check_stage(run, stage)
        return
    with pytest.raises(StageError) as error:
        check_stage(run, stage)
    assert word in one_line(error)


def test_a_stage_after_a_fresh_start_has_nothing_before_it(tmp_path, finished_run):
    run = run_in(tmp_path / "run", finished_run / "teachers")
    check_stage(run, "relabel")
    check_stage(run, "synthesize", fresh=True)
    with pytest.raises(StageError, match="contains no run to relabel"):
        check_stage(run, "relabel", fresh=True)


# -- inputs behind the names ------------------------------------------------------------------------------------------


def test_changed_inputs_are_detected_unless_the_run_is_moved_aside(finished_run, tmp_path):
    teacher = save_timm(tmp_path / "teacher", classes=10, names="0123456789")
    words = [f"teachers.logit=local-dir:{teacher}", f"relabel.teachers=['local-dir:{teacher}']"]
    run = run_in(tmp_path / "run", finished_run / "teachers", *words)
    check(run)
    record_inputs(run)
    check(run)
    path = tmp_path / "run" / "work" / "inputs.json"
    recorded = json.loads(path.read_text())
    assert recorded == {
        "train": run.data.train.content, "test": run.data.test.content,
        "teachers": {f"local-dir:{teacher}": run.teachers([f"local-dir:{teacher}"])[f"local-dir:{teacher}"].weights_sha256},
    }, "the stage squeeze checks a squeezed teacher"  # fmt: skip
    for change in ({"train": "0"}, {"test": "0"}, {"teachers": {f"local-dir:{teacher}": "0"}}):
        path.write_text(json.dumps(recorded | change))
        with pytest.raises(OutputError, match="have changed") as error:
            check(run)
        assert one_line(error)
        check(run, fresh=True)


# -- space ------------------------------------------------------------------------------------------------------------


def needed(folder, *overrides, **more):
    """Return the number of bytes that a run still needs."""
    AcceleratorState._reset_state(True)
    return missing_space(Run(tiny(*overrides), folder, folder / "teachers", make_accelerator(), **more))


def test_too_little_space_gives_a_one_line_error_with_both_numbers(tmp_path):
    folder = tmp_path / "not" / "there"
    check_space(needed(folder), folder)
    with pytest.raises(OutputError) as error:
        check_space(needed(folder, "relabel.epochs=2000000000"), folder)
    text = one_line(error)
    assert "needs about 4.16 TB, but only " in text
    assert "--output DIR" in text
    assert list(tmp_path.iterdir()) == []
    run = Run(tiny("relabel.epochs=2000000000"), folder, folder / "teachers", make_accelerator())
    with pytest.raises(OutputError, match="needs about 4.16 TB"):
        check(run)
    check(run, space=False)


def test_the_disk_of_the_cache_is_checked_too(tmp_path, monkeypatch):
    """Decoded images and logits for students are files in the cache of `datasets`."""
    recipe = tiny("synthesis.ipc=5")
    images = recipe.num_images
    assert cache_needed(recipe) == 2 * images * (recipe.data.channels * 16 * 16 + 2 * recipe.data.num_classes)
    assert cache_needed(recipe, control=False) == cache_needed(recipe) // 2
    with pytest.raises(OutputError, match="output .* needs about 500 TB"):  # one disk for both
        check_space(250 * 10**12, tmp_path, cached=250 * 10**12)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/dev/shm")
    if os.stat("/dev/shm").st_dev != tmp_path.stat().st_dev:
        with pytest.raises(OutputError, match=r"cache of `datasets`, '/dev/shm' needs about 250 TB.*HF_DATASETS_CACHE"):
            check_space(0, tmp_path, cached=250 * 10**12)


def test_existing_files_need_no_space(tmp_path):
    """A sparse file stands for the labels of an earlier launch."""
    (tmp_path / "work").mkdir()
    with open(tmp_path / "work" / "labels", "wb") as file:
        file.truncate(21 * 10**11)
    assert needed(tmp_path, "relabel.epochs=1000000000") == 0
    more = needed(tmp_path, "relabel.epochs=2000000000")
    assert more == pytest.approx(4.16e12 - 2.1e12, rel=1e-3)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "labels").hardlink_to(tmp_path / "work" / "labels")
    assert needed(tmp_path, "relabel.epochs=2000000000") == more, "two names for the same bytes"


def test_without_a_control_labels_take_half_the_space(tmp_path):
    words = "relabel.epochs=1000000000"
    assert needed(tmp_path, words, with_control=False) == pytest.approx(needed(tmp_path, words) / 2, rel=1e-6)
