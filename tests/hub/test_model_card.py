import copy
import json
import re

import pytest
import torch
import yaml
from each import diagonal, each, product
from huggingface_hub import ModelCard
from PIL import Image
from pipeline import one_line

from cards import HOSTILE, shape, shown, tokens
from prism_hf.errors import HubError
from prism_hf.hub.citations import CITATIONS
from prism_hf.hub.model_card import MODEL_METADATA_KEYS, render_model_card
from prism_hf.models.build import build_network
from prism_hf.models.facts import StudentFacts, TeacherFacts
from prism_hf.models.folder import store_network

NAMES = ["ant", "bee", "cat", "dog"]
SOURCE = {"id": "org/pets", "on_hub": True, "revision": "abc123", "license": "CC BY 4.0"}
STUDENT = {
    "kind": "student", "architecture": "test_resnet", "labels": "soft", "seed": 3, "epochs": 40, "test_top1": 0.9125,
    "test_count": 450, "channels": 3, "source": SOURCE, "test": {"id": "org/pets", "split": "val"},
    "dataset": {"name": "pets-prism", "content": "0123456789abcdef", "images": 40, "hub_id": None},
    "recipe_fingerprint": "f" * 16, "settings": {"lr": 0.01},
}  # fmt: skip
TEACHER = {
    "kind": "teacher", "teacher": "squeeze:test_resnet", "architecture": "test_resnet", "train_content": "7e3f",
    "fingerprint": "00edcd00f8f5", "train_count": 1347,
    "test_count": 450, "channels": 3, "source": SOURCE, "test": {"id": "org/pets", "split": "val"}, "test_top1": 0.5,
    "settings": {"seed": 7, "data": "org/pets", "steps": 100, "epochs": 14}, "wall_time_s": 1.5,
}  # fmt: skip
OLDER_TEACHER = {
    "teacher": "squeeze:test_resnet", "fingerprint": "00edcd00f8f5", "train_content": "7e3f", "test_top1": 0.25,
    "wall_time_s": 0.7, "settings": {"seed": 0, "data": "digits", "steps": 5},
}  # fmt: skip

BODY = """
# pets-student

An image classifier (test\\_resnet, 4 classes), trained from scratch on the distilled dataset me/pets-prism and on nothing
else: 40 images with soft labels, distilled from org/pets (revision abc123) with prism-hf.

## Results

| top-1 % | real test images | test dataset | split | seed | epochs |
| --- | --- | --- | --- | --- | --- |
| 91.2 | 450 | org/pets | val | 3 | 40 |

This is one seed, so the spread is unknown. The weights are those of the last epoch, not those with the best test score.

## Load

```python
import timm

model = timm.create_model("hf-hub:me/pets-student", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

```python
from transformers import pipeline

classify = pipeline("image-classification", model="me/pets-student")
labels = classify("picture.png")
```

## Input and classes

The input is an RGB image of 32 × 32 pixels. Values in [0, 1] are normalized with mean (0.485, 0.456, 0.406) and standard
deviation (0.229, 0.224, 0.225).

<details><summary>All 4 classes by label</summary>

0. ant
1. bee
2. cat
3. dog

</details>

## Limitations and license

The network was trained on images distilled from org/pets (license or terms: CC BY 4.0).
It reflects its training data and the teachers behind it, including errors and biases. It is meant for telling these classes
apart and for nothing else. No claims are made about privacy. The score holds only for the test images above.

`student.json`, next to this card, records these facts, the content digest of the distilled set and the training settings.

Made with prism-hf.
"""


def folder_of(folder, facts, names=NAMES, channels=3):
    with torch.random.fork_rng(devices=[]):
        network = build_network("test_resnet", num_classes=len(names), channels=channels).eval()
    store_network(network, folder, facts, size=32, class_names=names)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Real model folders of both kinds."""
    root = tmp_path_factory.mktemp("models")
    folders = {
        "student": folder_of(root / "student", StudentFacts(**STUDENT)),
        "teacher": folder_of(root / "teacher", TeacherFacts(**TEACHER)),
        "older": folder_of(root / "older", TeacherFacts(**TEACHER)),
    }
    TeacherFacts(**OLDER_TEACHER).write(folders["older"] / TeacherFacts.FILE)
    return folders


def written(folder, *, student=None, teacher=None, **config):
    """Write a folder with facts and config only; the card reads no weights."""
    plain = {
        "architecture": "test_resnet",
        "label_names": NAMES,
        "pretrained_cfg": {
            "input_size": [3, 32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "license": "mit",
        },
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(plain | config))
    for name, facts in (("student", student), ("squeeze", teacher)):
        if facts is not None:
            (folder / f"{name}.json").write_text(json.dumps(facts))
    return folder


def render(folder, repo_id="me/pets-student", dataset_id=None):
    card = render_model_card(folder, repo_id=repo_id, dataset_id=dataset_id)
    header, body = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    return card, yaml.safe_load(header), body


def changed(facts, path, value):
    facts, (*parents, last) = copy.deepcopy(facts), path.split(".")
    place = facts
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return facts


# -- content ----------------------------------------------------------------------------------------------------------


def test_the_students_card_in_full(made):
    card, header, body = render(made["student"], dataset_id="me/pets-prism")
    assert body == BODY
    assert list(header) == [key for key in MODEL_METADATA_KEYS if key != "license_name"]
    assert header == {
        "license": "cc-by-4.0",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "transformers", "dataset-distillation", "prism-hf"],
        "datasets": ["me/pets-prism", "org/pets"],
        "model-index": [
            {
                "name": "pets-student",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"type": "org/pets", "name": "org/pets", "split": "val", "revision": "abc123"},
                        "metrics": [{"type": "accuracy", "name": "top-1 accuracy", "value": 0.9125}],
                    }
                ],
            }
        ],
    }
    assert render(made["student"], dataset_id="me/pets-prism")[0] == card


def test_the_library_can_read_the_card(made):
    for folder in made.values():
        card, header, body = render(folder)
        data = ModelCard(card).data
        assert data.to_dict() == header
        (result,) = data.eval_results
        assert (result.task_type, result.metric_type) == ("image-classification", "accuracy")
        assert ModelCard(card).text.strip() == body.strip()


def test_the_teachers_card_names_its_training_data(made):
    _, header, body = render(made["teacher"])
    text = shown(body)
    assert "trained on 1,347 training images of org/pets (revision abc123): a teacher" in text
    assert "| 50.0 | 450 | org/pets | val | 7 | 14 |" in body
    assert header["datasets"] == ["org/pets"]
    assert "distilled from" not in text
    assert "`squeeze.json`" in body
    assert [t.content.strip() for t in tokens(body) if t.info == "bibtex"] == [CITATIONS["SRe2L"]["bibtex"]]
    assert f"(https://arxiv.org/abs/{CITATIONS['SRe2L']['arxiv']})" in body
    assert "1.5" not in body, "a card does not contain times"


def test_a_teacher_of_an_older_version_has_dashes_for_missing_facts(made):
    _, header, body = render(made["older"])
    assert "| 25.0 | - | digits | - | 0 | - |" in body
    assert "trained on real training images of digits: a teacher" in shown(body)
    assert "(license or terms: CC BY 4.0)" in shown(body)
    assert "datasets" not in header
    assert header["model-index"][0]["results"][0]["dataset"] == {"type": "digits", "name": "digits"}


@pytest.mark.parametrize(("kind", "known"), [("student", True), ("teacher", False)])
def test_a_card_says_that_a_network_takes_gray_images(tmp_path, kind, known):
    facts = {"student": STUDENT, "teacher": TEACHER}[kind] | {"channels": 1}
    text = shown(render(written(tmp_path, **{kind: facts}))[2])
    assert "trained on grayscale images only" in text
    assert ("folds the three channels into one" in text) == known
    assert "## Input" not in text
    assert "gray" not in shown(render(written(tmp_path, **{kind: facts | {"channels": 3}}))[2])


@pytest.mark.parametrize(
    ("hub_id", "dataset_id", "on_hub", "expected", "name"),
    [
        (None, None, True, ["org/pets"], "pets-prism"),
        (None, None, False, None, "pets-prism"),
        ("me/set", None, True, ["me/set", "org/pets"], "me/set"),
        ("me/set", "me/other", True, ["me/other", "org/pets"], "me/other"),
        (None, "me/other", False, ["me/other"], "me/other"),
        ("no/hub/id", None, False, None, "no/hub/id"),
    ],
)
def test_datasets_on_the_hub_are_linked(tmp_path, hub_id, dataset_id, on_hub, expected, name):
    facts = STUDENT | {"dataset": STUDENT["dataset"] | {"hub_id": hub_id}, "source": SOURCE | {"on_hub": on_hub}}
    _, header, body = render(written(tmp_path, student=facts), dataset_id=dataset_id)
    assert header.get("datasets") == expected
    assert f"the distilled dataset {name} and" in shown(body)


@pytest.mark.parametrize(
    ("license", "expected"),
    [("CC BY 4.0", ("cc-by-4.0", None)), ("MIT", ("mit", None)), ("my own terms", ("other", "my-own-terms"))],
)
def test_hub_licenses_are_recognized_and_others_are_named(tmp_path, license, expected):
    _, header, body = render(written(tmp_path, student=changed(STUDENT, "source.license", license)))
    assert (header["license"], header.get("license_name")) == expected
    assert f"(license or terms: {license})" in shown(body)


def test_all_classes_are_in_a_collapsed_list_numbered_by_label(tmp_path):
    body = render(written(tmp_path, student=STUDENT, label_names=[f"name{i}" for i in range(1000)]))[2]
    listed = body.partition("<summary>All 1000 classes by label</summary>")[2].partition("</details>")[0]
    assert listed.split("\n")[2:-2] == [f"{i}. name{i}" for i in range(1000)]


def test_the_loading_code_runs(made, tmp_path, monkeypatch):
    """The local folder stands in for the repository."""
    _, _, body = render(made["student"])
    first, second = (t.content for t in tokens(body) if t.type == "fence")
    monkeypatch.chdir(tmp_path)
    Image.new("L", (40, 30)).save("picture.png")
    scope = {}
    exec(first.replace("hf-hub:me/pets-student", f"local-dir:{made['student']}"), scope)
    exec(second.replace("me/pets-student", str(made["student"])), scope)
    assert {entry["label"] for entry in scope["labels"]} == set(NAMES)
    with torch.no_grad():
        logits = scope["model"](scope["transform"](Image.open("picture.png").convert("RGB"))[None])
    assert scope["labels"][0]["label"] == NAMES[logits.argmax()]
    assert scope["labels"][0]["score"] == pytest.approx(float(logits.softmax(1).max()), abs=1e-5)


# -- strictness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["student.json", "config.json"])
def test_a_one_line_error_names_a_missing_file(tmp_path, gone):
    (written(tmp_path, student=STUDENT) / gone).unlink()
    with pytest.raises(HubError) as error:
        render(tmp_path)
    assert gone in one_line(error)
    assert str(tmp_path) in one_line(error)


@each("name, text", product(["student.json", "config.json"], ["", "[]", "{]", "\xff"]))
def test_a_one_line_error_names_a_broken_file(tmp_path, name, text):
    (written(tmp_path, student=STUDENT) / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(HubError) as error:
        render(tmp_path)
    assert name in one_line(error)


@each(
    "path",
    [
        "architecture", "labels", "seed", "epochs", "test_top1", "test_count", "channels", "dataset", "source", "test",
        "dataset.name", "dataset.images", "dataset.hub_id", "source.id", "source.on_hub", "source.revision",
        "source.license", "test.id", "test.split",
    ],
)  # fmt: skip
def test_a_one_line_error_names_a_missing_fact_of_a_student(tmp_path, path):
    with pytest.raises(HubError) as error:
        render(written(tmp_path, student=changed(STUDENT, path, None)))
    assert "student.json" in one_line(error)
    assert path in one_line(error)


def test_a_missing_score_of_a_teacher_gives_a_one_line_error(tmp_path):
    with pytest.raises(HubError, match=r"squeeze\.json has no 'test_top1'"):
        render(written(tmp_path, teacher=changed(TEACHER, "test_top1", None)))


@pytest.mark.parametrize("value", ["0.9", True, 91.2, -0.1, float("nan"), [0.5]])
def test_a_score_outside_zero_to_one_gives_a_one_line_error(tmp_path, value):
    with pytest.raises(HubError, match=r"student\.json has .* as 'test_top1'[^:]*: ") as error:
        render(written(tmp_path, student=STUDENT | {"test_top1": value}))
    one_line(error)


@pytest.mark.parametrize(
    ("key", "value"), [("mean", "0.5"), ("mean", [0.5]), ("std", [0.1, 0.2, "x"]), ("input_size", None)]
)
def test_a_config_with_invalid_numbers_gives_a_one_line_error(tmp_path, key, value):
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "license": "mit"} | {key: value}
    with pytest.raises(HubError, match=rf"config\.json has .* as 'pretrained_cfg\.{key}.*': ") as error:
        render(written(tmp_path, student=STUDENT, pretrained_cfg=cfg))
    one_line(error)


@pytest.mark.parametrize("key", ["architecture", "label_names", "pretrained_cfg", "mean", "license"])
def test_a_config_without_the_facts_for_the_card_gives_a_one_line_error(tmp_path, key):
    path = written(tmp_path, student=STUDENT) / "config.json"
    config = json.loads(path.read_text())
    del (config if key in config else config["pretrained_cfg"])[key]
    path.write_text(json.dumps(config))
    with pytest.raises(HubError) as error:
        render(tmp_path)
    assert "config.json" in one_line(error)
    assert key in one_line(error)


def test_label_names_that_are_not_a_list_give_a_one_line_error(tmp_path):
    with pytest.raises(HubError, match="as 'label_names': Input should be a valid array"):
        render(written(tmp_path, student=STUDENT, label_names={"0": "ant"}))


@pytest.mark.parametrize("path", ["settings.data", "source.id", "test.id", "teacher"])
def test_a_local_path_in_the_facts_is_not_published(tmp_path, path):
    """Teachers of older versions record the full path of a local source."""
    with pytest.raises(HubError) as error:
        render(written(tmp_path, teacher=changed(TEACHER, path, "/home/someone/pets")))
    assert "squeeze.json" in one_line(error)
    assert "/home/someone/pets" in one_line(error)


@each("given", ["a/b/c", "a b/c", "org/na`me", 'org/"x', "org/name\n", "-org/x", "", "org/鹤", "a--b"])
@pytest.mark.parametrize("which", ["repo_id", "dataset_id"])
def test_an_invalid_id_gives_a_one_line_error(made, given, which):
    with pytest.raises(HubError) as error:
        render_model_card(made["student"], **({"repo_id": "me/x"} | {which: given}))
    assert "is not a Hub id" in one_line(error)


# -- hostile text -----------------------------------------------------------------------------------------------------

PLACES = (
    "class", "architecture", "labels", "dataset.name", "dataset.hub_id", "source.id", "source.revision", "source.license",
    "test.id", "test.split",
)  # fmt: skip


@each("place, text", product(PLACES, HOSTILE), some=diagonal(PLACES, HOSTILE))
def test_hostile_text_breaks_neither_header_nor_table_nor_html(tmp_path, place, text):
    plain = shape(render(written(tmp_path, student=STUDENT))[2])
    if place == "class":
        written(tmp_path, student=STUDENT, label_names=["ant", text, "cat", "dog"])
    else:
        written(tmp_path, student=changed(STUDENT, place, text))
    card, header, body = render(tmp_path)
    assert shape(body) == plain
    assert re.sub("[\x00\x1b\u202e]", "\ufffd", " ".join(text.split())) in shown(body)
    assert set(header) <= set(MODEL_METADATA_KEYS)
    assert ModelCard(card).data.to_dict() == header
    assert "<script>" not in body
    assert header["license"] == ("other" if place == "source.license" else "cc-by-4.0")
    assert ("license_name" in header) == (place == "source.license")
    assert header.get("datasets") == (None if place == "source.id" else ["org/pets"])


@pytest.mark.parametrize("place", ["seed", "epochs", "test_count", "channels", "dataset.images", "source.on_hub"])
def test_text_in_place_of_a_number_gives_a_one_line_error(tmp_path, place):
    for text in HOSTILE:
        with pytest.raises(HubError) as error:
            render(written(tmp_path, student=changed(STUDENT, place, text)))
        assert place in one_line(error)
        assert one_line(error).isprintable()


def test_the_loading_code_names_the_branch(made):
    main, branch = (render_model_card(made["teacher"], repo_id="me/net", revision=name) for name in (None, "v2"))
    assert 'timm.create_model("hf-hub:me/net"' in main
    assert 'timm.create_model("hf-hub:me/net@v2"' in branch
    assert 'model="me/net", revision="v2")' in branch
