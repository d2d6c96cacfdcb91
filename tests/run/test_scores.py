import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_teacher
from pipeline import sha_tree
from prism_hf.run.scores import Contest, collect, run_task, task_file, task_key

from prism_hf.dataset.reader import DistilledDataset
from prism_hf.evaluation.students import KEPT, ROWS, Keep, Row
from prism_hf.images.pixels import to_reference
from prism_hf.images.source import load_source
from prism_hf.images.views import draw_views, from_columns, to_columns
from prism_hf.models.facts import ScoredOn, SourceFacts
from prism_hf.models.load import load_teacher
from prism_hf.recipe.yaml_file import load_recipe
from prism_hf.run import scores as evaluation
from prism_hf.runtime.store import digest, write_record

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

    def some(_, rows):
        return views[rows.start : rows.stop], logits[rows.start : rows.stop]

    return DistilledDataset(images, labels, data.class_names, logits, 1, some, 100 + seed, 200 + seed, None, str(seed))


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


IMAGE_ROWS = (Row("distilled", "image"), Row("random_real", "image"))


def test_rows_with_image_labels_can_be_asked_for(source, tmp_path):
    assert not set(IMAGE_ROWS) & set(ROWS)
    made = contest(source, wanted=(*ROWS, *IMAGE_ROWS))
    assert {row for row, _ in made.tasks()} == {*ROWS, *IMAGE_ROWS}
    assert IMAGE_ROWS[1] not in contest(source, wanted=IMAGE_ROWS, control=None).rows()
    assert len({task_key(made, row) for row in made.rows()}) == 7
    made = contest(source, wanted=IMAGE_ROWS)
    for row, seed in made.tasks():
        run_task(made, row, seed, tmp_path, device=DEVICE)
    found = collect(made, tmp_path, verifier=None, network=None, device=DEVICE)
    assert [(score.images, score.labels) for score in found.scores] == [("distilled", "image"), ("random_real", "image")]
    assert "With image labels" in found.as_dict()["in_words"]


def test_scores_from_before_label_epochs_are_still_theirs(source):
    made = contest(source)
    settings = dataclasses.asdict(dataclasses.replace(made.settings, seeds=(0,)))
    assert settings.pop("label_epochs") is None
    key = digest(["distilled-soft", "0", made.test.content, settings, None])[:16]
    assert task_key(made, KEPT) == key
    fewer = contest(source, settings=dataclasses.replace(made.settings, label_epochs=1))
    assert task_key(fewer, KEPT) != key


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
    write_record(path, {"top1": 0.125, "key": task_key(made, row)})
    run_task(made, row, 0, tmp_path, device=DEVICE)
    assert json.loads(path.read_text())["top1"] == 0.125


def keep_in(folder):
    source = SourceFacts(id="digits", on_hub=False, revision=None, licence="CC BY 4.0")
    return Keep(folder / "student", source, ScoredOn(id="digits", split="test"), dataset_id="org/set")


@pytest.fixture(scope="module")
def kept(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    made = contest(source)
    run_task(made, *made.kept(), folder, device=DEVICE, keep=keep_in(folder))
    return made, folder


def test_the_kept_student_scores_what_its_facts_and_its_score_say(kept):
    made, folder = kept
    facts = json.loads((folder / "student" / "student.json").read_text())
    assert facts["test_top1"] == json.loads(task_file(folder, *made.kept()).read_text())["top1"]
    assert facts["test_count"] == len(made.test) == 450
    student = load_teacher(f"local-dir:{folder / 'student'}", device=DEVICE)
    with torch.no_grad():
        guesses = student.logits(to_reference(made.test.images(range(450)))).argmax(1)
    assert float((guesses == torch.from_numpy(made.test.labels)).double().mean()) == pytest.approx(facts["test_top1"])
    assert student.label_names == tuple("0123456789")
    assert student.licence == "CC BY 4.0"
    assert student.size == 32


@pytest.mark.parametrize(
    ("row", "seed", "there"),
    [*((row, 0, row == KEPT) for row in ROWS), (KEPT, 1, False)],
    ids=lambda value: value.key if isinstance(value, Row) else str(value),
)
def test_only_the_first_student_of_the_soft_distilled_row_is_kept(source, kept, tmp_path, row, seed, there):
    run_task(contest(source), row, seed, tmp_path, device=DEVICE, keep=keep_in(tmp_path))
    assert task_file(tmp_path, row, seed).is_file()
    assert (tmp_path / "student").is_dir() == there
    if there:
        assert sha_tree(tmp_path) == sha_tree(kept[1])


def test_the_first_seed_is_that_of_the_settings(source, tmp_path):
    settings = load_recipe("recipes/digits/prism_ipc10.yaml", [*TINY, "evaluation.seeds=[7,0]"]).evaluation
    for seed in (0, 7):
        run_task(contest(source, settings=settings), KEPT, seed, tmp_path, device=DEVICE, keep=keep_in(tmp_path))
        assert (tmp_path / "student").is_dir() == (seed == 7)
    assert json.loads((tmp_path / "student" / "student.json").read_text())["seed"] == 7


def test_no_student_is_kept_unless_asked(source, tmp_path):
    run_task(contest(source), KEPT, 0, tmp_path, device=DEVICE)
    assert list(sha_tree(tmp_path)) == ["distilled-soft-seed0.json"]


def test_a_run_killed_between_student_and_score_makes_both_again(source, kept, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            run_task(contest(source), KEPT, 0, tmp_path, device=DEVICE, keep=keep_in(tmp_path))
    assert (tmp_path / "student" / "student.json").is_file()
    (tmp_path / "student" / "student.json").write_text("{}")
    run_task(contest(source), KEPT, 0, tmp_path, device=DEVICE, keep=keep_in(tmp_path))
    assert sha_tree(tmp_path) == sha_tree(kept[1])


def test_a_score_without_its_student_is_left_as_it_is(source, kept, tmp_path):
    """A run of an older version."""
    shutil.copytree(kept[1], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "student")
    run_task(contest(source), KEPT, 0, tmp_path, device=DEVICE, keep=keep_in(tmp_path))
    assert list(sha_tree(tmp_path)) == ["distilled-soft-seed0.json"]


def test_collect_reads_every_score_into_its_own_row(source, tmp_path):
    made = contest(source)
    for number, (row, seed) in enumerate(made.tasks()):
        write_record(task_file(tmp_path, row, seed), {"top1": number / 100})
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
        write_record(task_file(tmp_path, row, seed), {"top1": 0.5})
    facts = collect(made, tmp_path, verifier=judge, network=judge, device=DEVICE).sets["distilled"]
    assert 0 <= facts.verifier_top1 <= 1
    assert -1 <= facts.diversity.mean <= 1
