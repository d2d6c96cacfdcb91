"""The stage evaluate: students are trained once, and one of them is kept."""

import dataclasses
import json
import shutil
from functools import partial

import pytest
import torch
from digit_scores import digits, packed, tasks
from pipeline import run_in, sha_tree

from prism_hf.errors import StageError
from prism_hf.evaluation.scores import train_and_score
from prism_hf.evaluation.students import KEPT, ROWS, keep_student
from prism_hf.images.pixels import to_reference
from prism_hf.models.facts import SourceFacts
from prism_hf.models.folder import scored_on
from prism_hf.models.load import load_teacher
from prism_hf.run.distill import run_stages
from prism_hf.run.evaluate import collect, left_out, train_students

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def source():
    return digits()


def train(folder, finished_run, source, *, rows=(KEPT,), keep=True, settings=None):
    """Train the students of some rows, as the stage does, and return the tasks."""
    recipe, data = source
    settings = settings or recipe.evaluation
    made = tasks(folder / "students", recipe, data, rows=rows, settings=settings)
    run = run_in(folder / "run", finished_run / "teachers")
    run = dataclasses.replace(run, recipe=dataclasses.replace(recipe, evaluation=settings))
    facts = SourceFacts(id="digits", on_hub=False, revision=None, license="CC BY 4.0")
    keeper = partial(
        keep_student, folder=folder / "student", distilled=packed(data, 0), settings=settings, source=facts,
        tested_on=scored_on(recipe), test_count=len(data.test), dataset_id="org/set",
    )  # fmt: skip
    train_students(run, made, keep=keeper if keep else None)
    return made


def left(folder):
    """Return the files that the students leave."""
    return {name: sha for name, sha in sha_tree(folder).items() if name.startswith("student")}


@pytest.fixture(scope="module")
def kept(finished_run, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    return folder, train(folder, finished_run, source)


def test_the_kept_student_has_the_score_in_its_facts_and_its_score_file(kept, source):
    folder, made = kept
    data = source[1]
    facts = json.loads((folder / "student" / "student.json").read_text())
    assert facts["test_top1"] == made[0].score.read_json()["top1"]
    assert facts["test_count"] == len(data.test) == 450
    assert facts["dataset"]["hub_id"] == "org/set"
    student = load_teacher(f"local-dir:{folder / 'student'}", device=DEVICE)
    with torch.no_grad():
        guesses = student.logits(to_reference(data.test.images(range(450)))).argmax(1)
    assert float((guesses == torch.from_numpy(data.test.labels)).double().mean()) == pytest.approx(facts["test_top1"])
    assert student.label_names == tuple("0123456789")
    assert student.license == "CC BY 4.0"
    assert student.size == 32


def test_only_the_first_student_of_the_soft_distilled_row_is_kept(source, finished_run, kept, tmp_path):
    others = [row for row in ROWS if row != KEPT]
    made = train(tmp_path / "others", finished_run, source, rows=others)
    assert all(task.score.path.is_file() for task in made)
    assert not (tmp_path / "others" / "student").exists()
    assert json.loads((kept[0] / "student" / "student.json").read_text())["seed"] == 0


def test_the_kept_student_has_the_first_seed_in_the_settings(source, finished_run, tmp_path):
    settings = dataclasses.replace(source[0].evaluation, seeds=(7, 0))
    train(tmp_path, finished_run, source, settings=settings)
    assert json.loads((tmp_path / "student" / "student.json").read_text())["seed"] == 7


def test_no_student_is_kept_unless_requested(source, finished_run, tmp_path):
    made = train(tmp_path, finished_run, source, keep=False)
    assert {name.removesuffix(".seal") for name in left(tmp_path)} == {f"students/{task.score.path.name}" for task in made}


def test_scores_are_not_recomputed(source, finished_run, kept, tmp_path):
    shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
    made = tasks(tmp_path / "students", *source, rows=(KEPT,))
    made[0].score.write_json({"top1": 0.125})
    train(tmp_path, finished_run, source)
    assert made[0].score.read_json() == {"top1": 0.125}


def test_a_run_killed_between_student_and_score_recreates_both(source, finished_run, kept, tmp_path):
    task = tasks(tmp_path / "students", *source, rows=(KEPT,))[0]

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # the student is stored before the score
        train_and_score(task, device=DEVICE, keep=killed)
    assert not task.score.path.exists()
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "student.json").write_text("{}")
    train(tmp_path, finished_run, source)
    assert left(tmp_path) == left(kept[0])


def test_a_score_without_its_student_is_not_changed(source, finished_run, kept, tmp_path):
    shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "student")
    train(tmp_path, finished_run, source)
    assert not (tmp_path / "student").exists()


def test_all_measurements_are_collected_in_the_table(source, finished_run, tmp_path):
    recipe, data = source
    run = run_in(tmp_path / "run", finished_run / "teachers")
    made = tasks(tmp_path, recipe, data, without=["full"])
    for task in made:
        task.score.write_json({"top1": 0.5})
    sources = {"distilled": packed(data, 0), "random_real": packed(data, 1)}
    reasons = left_out(run, {"distilled": sources["distilled"]})
    assert reasons == {"random real": "a class has fewer real training images than ipc"}
    evaluation = collect(run, made, sources, left_out=reasons, verifier=None, network=run.judge)
    assert [evaluation[key] for key in ("student", "epochs", "test_count")] == ["test_byobnet", 1, 450]
    assert (evaluation["verifier"], evaluation["similarity_network"]) == (None, "squeeze:test_byobnet")
    assert evaluation["left_out"] == reasons
    assert -1 <= evaluation["sets"]["distilled"]["intra_class_similarity"]["mean"] <= 1
    assert "With soft labels" in evaluation["in_words"]


def test_the_error_for_a_run_that_is_not_packaged_names_the_next_stage(finished_run, tmp_path):
    with pytest.raises(StageError, match="run --stage package first"):
        run_stages(run_in(tmp_path / "run", finished_run / "teachers"), ("evaluate",))


def test_all_real_is_left_out_if_only_a_part_is_read(finished_run, tmp_path):
    run = run_in(tmp_path / "run", finished_run / "teachers", "data.images_per_class=20")
    assert left_out(run, {})["all real"] == "only a part of the training images is read (data.images_per_class)"
    assert len(run.data.train) == 200
