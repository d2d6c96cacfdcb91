import dataclasses
import json

import pytest
from conftest import make_teacher
from pipeline import one_line, tiny

from prism_hf.errors import OutputError, RecipeError, TeacherError
from prism_hf.images.source import load_source
from prism_hf.run.preflight import check_inputs, check_space, check_verifier, inputs_of, missing_space


def named(name, architecture="test_byobnet"):
    return dataclasses.replace(make_teacher(architecture, num_classes=10), name=name)


def test_a_verifier_of_another_architecture_passes():
    check_verifier(tiny("teachers.verifier=squeeze:test_resnet"), {})
    check_verifier(tiny("teachers.verifier=null"), {})


@pytest.mark.parametrize("role", ["logit", "bn_pool"])
def test_an_architecture_in_the_loss_is_no_verifier(role):
    architecture = {"logit": "test_byobnet", "bn_pool": "test_efficientnet"}[role]
    recipe = tiny("teachers.verifier=local-dir:somewhere")
    with pytest.raises(RecipeError, match=f"has the architecture of teacher 'squeeze:{architecture}'"):
        check_verifier(recipe, {"local-dir:somewhere": named("local-dir:somewhere", architecture)})


def test_a_verifier_needs_a_linear_classifier():
    judge = named("local-dir:x", "test_resnet")
    judge.model.fc = None
    with pytest.raises(TeacherError, match="no linear classifier"):
        check_verifier(tiny("teachers.verifier=local-dir:x"), {"local-dir:x": judge})


def test_changed_inputs_are_noticed(tmp_path):
    recipe = tiny()
    data = load_source(recipe.data)
    other = named("local-dir:x")
    before = inputs_of(recipe, data, {"local-dir:x": other, "squeeze:test_byobnet": other})
    assert set(before["teachers"]) == {"local-dir:x"}
    path = tmp_path / "inputs.json"
    check_inputs(path, before)
    path.write_text(json.dumps(before))
    check_inputs(path, before)
    for change in ({"train": "0"}, {"test": "0"}, {"teachers": {"local-dir:x": "0"}}):
        with pytest.raises(OutputError, match="have changed"):
            check_inputs(path, before | change)


def test_too_little_space_is_one_line_with_both_numbers(tmp_path):
    folder = tmp_path / "not" / "there"
    check_space(missing_space(tiny(), folder, processes=8), folder)
    with pytest.raises(OutputError) as error:
        check_space(missing_space(tiny("relabel.epochs=2000000000"), folder, processes=1), folder)
    text = one_line(error)
    assert "needs about 8.32 TB and " in text
    assert "--output DIR" in text
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_needs_no_space(tmp_path):
    """A sparse file stands for the labels of an earlier launch."""
    recipe = tiny("relabel.epochs=1000000000")
    (tmp_path / "work").mkdir()
    with open(tmp_path / "work" / "labels", "wb") as file:
        file.truncate(42 * 10**11)
    assert missing_space(recipe, tmp_path, processes=1) == 0
    more = missing_space(tiny("relabel.epochs=2000000000"), tmp_path, processes=1)
    assert more == pytest.approx(8.32e12 - 4.2e12, rel=1e-3)


def test_without_a_control_labels_take_half_the_space(tmp_path):
    recipe = tiny("relabel.epochs=1000000000")
    with_control, without = (missing_space(recipe, tmp_path, processes=1, control=control) for control in (True, False))
    assert without == pytest.approx(with_control / 2, rel=1e-6)
