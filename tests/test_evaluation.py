import json

import numpy as np
import pytest
import torch
from conftest import make_teacher

from prism_hf.data import load_source
from prism_hf.evaluation import Contest, collect, run_task, task_file
from prism_hf.reading import DistilledDataset
from prism_hf.recipe_file import load_recipe
from prism_hf.students import ROWS, Row
from prism_hf.views import draw_views, from_columns, to_columns

DEVICE = torch.device("cpu")
TINY = [
    "evaluation.student=test_byobnet",
    "evaluation.seeds=[0,1]",
    "evaluation.epochs=1",
    "evaluation.full_data_epochs=1",
    "evaluation.batch_size=10",
]


@pytest.fixture(scope="module")
def source():
    recipe = load_recipe("recipes/digits/prism_ipc10.yaml", TINY)
    return recipe, load_source(recipe.data)


def packed(data, seed):
    rows = np.concatenate([own[:2] for own in data.train.rows_by_class(10)])
    generator = torch.Generator().manual_seed(seed)
    view = draw_views(20, 32, generator, crop_scale=(0.6, 1.0), flip=False)
    views = from_columns(to_columns(view, torch.arange(20)))
    labels = torch.from_numpy(data.train.labels[rows])
    logits = torch.nn.functional.one_hot(labels, 10).half() * 5
    images = data.train.images(rows)
    return DistilledDataset(
        images, labels, data.class_names, logits, 1, lambda _: (views, logits), 100 + seed, 200 + seed, None, str(seed)
    )


def contest(source, **changes):
    recipe, data = source
    values = {
        "distilled": packed(data, 0),
        "control": packed(data, 1),
        "train": data.train,
        "test": data.test,
        "settings": recipe.evaluation,
        "view": recipe.relabel.view,
        "left_out": {},
    }
    return Contest(**(values | changes))


def test_all_rows_have_every_seed(source):
    assert sorted(contest(source).tasks(), key=str) == sorted(((r, s) for r in ROWS for s in (0, 1)), key=str)


@pytest.mark.parametrize(("missing", "gone"), [("control", "random_real"), ("train", "full")])
def test_a_row_that_cannot_be_had_is_left_out(source, missing, gone):
    assert gone not in {row.images for row in contest(source, **{missing: None}).rows()}


def test_no_ceiling_without_epochs_for_it(source):
    recipe, _ = source
    settings = load_recipe("recipes/digits/prism_ipc10.yaml", [*TINY, "evaluation.full_data_epochs=0"]).evaluation
    assert settings != recipe.evaluation
    assert "full" not in {row.images for row in contest(source, settings=settings).rows()}


def test_scores_are_kept_and_not_computed_again(source, tmp_path):
    made = contest(source)
    row = Row("distilled", "hard")
    run_task(made, row, 0, tmp_path, device=DEVICE)
    path = task_file(tmp_path, row, 0)
    assert 0 <= json.loads(path.read_text())["top1"] <= 1
    path.write_text('{"top1": 0.125}')
    run_task(made, row, 0, tmp_path, device=DEVICE)
    assert json.loads(path.read_text())["top1"] == 0.125


def test_collect_reads_every_score_into_its_own_row(source, tmp_path):
    made = contest(source)
    for number, (row, seed) in enumerate(made.tasks()):
        task_file(tmp_path, row, seed).write_text(json.dumps({"top1": number / 100}))
    found = collect(made, tmp_path, verifier=None, network=None, device=DEVICE)
    expected = {(row, seed): number / 100 for number, (row, seed) in enumerate(made.tasks())}
    for score in found.scores:
        assert score.top1 == tuple(expected[Row(score.images, score.labels), seed] for seed in (0, 1))
    assert {s.images: s.count for s in found.scores} == {"distilled": 20, "random_real": 20, "full": len(made.train)}
    assert (found.sets["distilled"].image_bytes, found.sets["random_real"].label_bytes) == (100, 201)
    assert found.sets["distilled"].verifier_top1 is None


def test_the_verifier_judges_and_measures_similarity(source, tmp_path):
    judge = make_teacher("test_byobnet", num_classes=10)
    made = contest(source, train=None)
    for row, seed in made.tasks():
        task_file(tmp_path, row, seed).write_text('{"top1": 0.5}')
    facts = collect(made, tmp_path, verifier=judge, network=judge, device=DEVICE).sets["distilled"]
    assert 0 <= facts.verifier_top1 <= 1
    assert -1 <= facts.diversity.mean <= 1
