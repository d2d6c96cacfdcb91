"""Students of the table as independent tasks, and measurements without training."""

import dataclasses

import pytest
import torch
from conftest import make_teacher
from digit_scores import digits, packed, sources, tasks
from pipeline import add_card, sha_tree, small_set

from prism_hf.dataset.reader import load_distilled
from prism_hf.errors import DamagedError
from prism_hf.evaluation.scores import is_scored, read_scores, set_facts, student_tasks, train_and_score
from prism_hf.evaluation.students import KEPT, ROWS, Row
from prism_hf.images.pixels import to_reference
from prism_hf.images.source import load_source
from prism_hf.runtime.checkpoint import Checkpoint, State

DEVICE = torch.device("cpu")
IMAGE_ROWS = (Row("distilled", "image"), Row("random_real", "image"))


@pytest.fixture(scope="module")
def source():
    return digits()


def one(folder, source, row=KEPT, seed=0, **more):
    """Return one student's task."""
    (task,) = [task for task in tasks(folder, *source, **more) if (task.row, task.seed) == (row, seed)]
    return task


# -- which students ---------------------------------------------------------------------------------------------------


def test_all_rows_have_every_seed_and_the_long_ones_come_first(source, tmp_path):
    made = [(task.row, task.seed) for task in tasks(tmp_path, *source)]
    assert made == [(row, seed) for row in reversed(ROWS) for seed in (0, 1)]
    assert made[0][0].images == "full"


def test_rows_with_image_labels_can_be_requested(source, tmp_path):
    assert not set(IMAGE_ROWS) & set(ROWS)
    made = tasks(tmp_path, *source, rows=(*ROWS, *IMAGE_ROWS))
    assert {task.row for task in made} == {*ROWS, *IMAGE_ROWS}
    assert len({task.score.key for task in made}) == 7, "seeds share the key, but each has its own file"
    assert len({task.score.path for task in made}) == 14
    assert {task.row for task in tasks(tmp_path, *source, rows=IMAGE_ROWS, without=["random_real"])} == {IMAGE_ROWS[0]}
    made = tasks(tmp_path, *source, rows=IMAGE_ROWS)
    for task in made:
        train_and_score(task, device=DEVICE)
    scores = read_scores(made)
    assert [(score["images"], score["labels"]) for score in scores] == [("distilled", "image"), ("random_real", "image")]


@pytest.mark.parametrize("missing", ["random_real", "full"])
def test_an_unavailable_row_is_left_out(source, tmp_path, missing):
    assert missing not in {task.row.images for task in tasks(tmp_path, *source, without=[missing])}


def test_no_ceiling_row_without_full_data_epochs(source, tmp_path):
    settings = dataclasses.replace(source[0].evaluation, full_data_epochs=0)
    assert "full" not in {task.row.images for task in tasks(tmp_path, *source, settings=settings)}


# -- scores -----------------------------------------------------------------------------------------------------------


def test_the_key_of_a_score_depends_on_all_its_inputs(source, tmp_path):
    recipe, data = source
    plain, full = one(tmp_path, source), one(tmp_path, source, Row("full", "hard"))
    assert plain.score.key == one(tmp_path / "elsewhere", source, seed=1).score.key
    settings = recipe.evaluation
    changes = [
        {"settings": dataclasses.replace(settings, lr=0.5)},
        {"settings": dataclasses.replace(settings, label_epochs=1)},
        {"source": packed(data, 7)},
        {"test": data.train},
        {"row": Row("distilled", "hard")},
    ]
    assert all(dataclasses.replace(plain, **change).score.key != plain.score.key for change in changes)
    assert dataclasses.replace(plain, settings=dataclasses.replace(settings, seeds=(5, 6))).score.key == plain.score.key
    view = dataclasses.replace(recipe.relabel.view, mix="none")
    assert dataclasses.replace(full, view=view).score.key != full.score.key, "crops of real images"
    assert dataclasses.replace(plain, view=view).score.key == plain.score.key, "the dataset has its own views"
    assert plain.checkpoint.key != one(tmp_path, source, seed=1).checkpoint.key


def test_a_score_is_kept_and_its_checkpoint_is_removed(source, tmp_path):
    task = one(tmp_path, source, Row("distilled", "hard"))
    assert not is_scored(task)
    train_and_score(task, device=DEVICE, every_s=0)
    assert 0 <= task.score.read_json()["top1"] <= 1
    assert sorted(sha_tree(tmp_path)) == ["distilled-hard-seed0.json", "distilled-hard-seed0.json.seal"]
    Checkpoint(task.checkpoint).save(State({"a": torch.zeros(1)}, {}))  # as if killed before removing it
    assert is_scored(task)
    assert not task.checkpoint.path.exists()


@pytest.mark.parametrize("kind", ["edited", "of another protocol"])
def test_a_modified_score_is_set_aside(source, tmp_path, caplog, kind):
    task = one(tmp_path, source)
    task.score.write_json({"top1": 0.5})
    if kind == "edited":
        task.score.path.write_text('{"top1": 0.6}')
    else:
        task = dataclasses.replace(task, settings=dataclasses.replace(task.settings, lr=0.5))
    with pytest.raises(DamagedError):
        read_scores([task])
    assert not is_scored(task)
    assert "distilled-soft-seed0.json.aside-1" in caplog.text


def test_every_score_is_read_into_its_own_row(source, tmp_path):
    made = tasks(tmp_path, *source)
    for number, task in enumerate(made):
        task.score.write_json({"top1": number / 100})
    expected = {(task.row, task.seed): number / 100 for number, task in enumerate(made)}
    scores = read_scores(made)
    assert [Row(score["images"], score["labels"]) for score in scores] == list(ROWS), "in the order of the table"
    for score in scores:
        assert score["top1"] == [expected[Row(score["images"], score["labels"]), seed] for seed in (0, 1)]
        assert score["seeds"] == [0, 1]
    assert {score["images"]: score["count"] for score in scores} == {
        "distilled": 20,
        "random_real": 20,
        "full": len(source[1].train),
    }


# -- measurements without training ------------------------------------------------------------------------------------


def test_sizes_of_each_dataset_need_no_network(source):
    facts = {
        name: set_facts(each, verifier=None, network=None, num_classes=10, device=DEVICE)
        for name, each in sources(source[1]).items()
    }
    assert (facts["distilled"]["image_bytes"], facts["random_real"]["label_bytes"]) == (100, 201)
    assert facts["distilled"]["verifier_top1"] is None
    nothing = {"image_bytes": None, "label_bytes": None, "verifier_top1": None}
    assert facts["full"] == nothing | {"count": 1347} | {"intra_class_similarity": {"mean": None, "per_class": [None] * 10}}


def test_the_verifier_scores_images_and_measures_similarity(source):
    judge = make_teacher("test_byobnet", num_classes=10)
    given = sources(source[1])
    facts = set_facts(given["distilled"], verifier=judge, network=judge, num_classes=10, device=DEVICE)
    with torch.no_grad():
        answers = judge.logits(to_reference(given["distilled"].images_uint8)).argmax(1)
    assert facts["verifier_top1"] == float((answers == given["distilled"].labels).double().mean())
    assert -1 <= facts["intra_class_similarity"]["mean"] <= 1
    full = set_facts(given["full"], verifier=judge, network=judge, num_classes=10, device=DEVICE)
    assert full["verifier_top1"] is None, "only packaged images are judged"
    assert -1 <= full["intra_class_similarity"]["mean"] <= 1


def test_a_score_depends_on_the_epochs_that_a_recipe_plans(tmp_path):
    """With fewer stored epochs, the same files can be made for another number of epochs of training."""
    recipe, names, *_ = small_set(tmp_path, epochs=2)
    add_card(tmp_path, recipe, names)
    source = load_distilled(tmp_path)
    keys = set()
    for epochs in (2, 6, 9):
        relabel = dataclasses.replace(recipe.relabel, epochs=epochs, stored_epochs=2)
        planned = dataclasses.replace(source, recipe=dataclasses.replace(recipe, relabel=relabel))
        settings, test = recipe.evaluation, load_source(dataclasses.replace(recipe.data, num_classes=10)).test
        (task,) = student_tasks(
            {"distilled": planned}, test, dataclasses.replace(settings, seeds=(0,)), recipe.relabel.view, tmp_path,
            num_classes=4, rows=ROWS[:1],
        )  # fmt: skip
        keys.add(task.score.key)
    assert len(keys) == 3
