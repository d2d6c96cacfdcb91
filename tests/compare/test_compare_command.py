"""`prism-hf compare` and recipes/compare.py, which calls it."""

import json
import shutil

import pytest
from pipeline import launch, mtimes, random_picture, tiny

from prism_hf.cli.compare import public_word
from prism_hf.recipe.yaml_file import dump_recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# There are only three classes, so the batch sizes in the recipes would be too large.
THREE = ("synthesis.batch_size=3", "relabel.batch_size=6", "squeeze.batch_size=16", "evaluation.batch_size=6",
         "evaluation.full_data_epochs=1", "data.channels=3")  # fmt: skip


def go(*words, **options):
    return launch(*words, name="compare", recipe=None, **options)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("recipes"), []
    for name, words in {"prism": (), "sre2l": ("teachers.bn_pool=[]", "relabel.epochs=1")}.items():
        made.append(folder / f"{name}.yaml")
        made[-1].write_text(dump_recipe(tiny(f"name={name}", *words)))
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An ImageFolder of three classes."""
    folder = tmp_path_factory.mktemp("data") / "zoo"
    for split, count in (("train", 12), ("test", 4)):
        for number, name in enumerate(("ant", "bee", "cat")):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                random_picture(20, 18, seed=100 * number + i + 1000 * (split == "test")).save(place / f"{i}.png")
    return folder


def test_a_dry_run_lists_the_runs_and_creates_nothing(tmp_path, capsys, monkeypatch, recipes):
    monkeypatch.chdir(tmp_path)
    assert go("--dry-run", *recipes, "--seeds", "0,1,5", "--students", "resnet18,test_resnet") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "3 methods, 3 seeds: 9 runs" in out
    for line in ("random real: 20 images, 0 steps", "prism: 20 images, 8 steps", "note: "):
        assert line in out
    assert "resnet18 (soft labels), resnet18 (hard labels), test_resnet (soft" in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_on_other_data_counts_the_classes_of_that_data(tmp_path, capsys, monkeypatch, pictures, recipes):
    monkeypatch.chdir(tmp_path)
    assert go("--dry-run", *recipes, *THREE, "--data", pictures) == 0
    assert "prism: 6 images, 8 steps" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


BAD = {
    "no recipe": ("", ["synthesis.ipc=2"], ["at least one recipe"]),
    "missing recipe": ("", ["nowhere.yaml"], ["nowhere.yaml"]),
    "two of a name": ("aa", [], ["two methods are called 'prism'"]),
    "unknown student": ("a", ["--students", "resnet18,nonsense"], ["nonsense"]),
    "no data": ("a", ["--data", "/no/such/folder"], ["/no/such/folder"]),
    "unknown key": ("a", ["synthesis.iteration=3"], ["iterations"]),
    "unknown teacher": ("ab", ["teachers.logit=squeeze:nonsense"], ["nonsense"]),
    "classes": ("a", ["data.num_classes=11"], ["10 classes"]),
    "few candidates": ("a", ["synthesis.init=mosaic", "synthesis.mosaic={candidates: 3}"], ["needs 8 candidates"]),
    "batches for three classes": ("a", ["--data", "PICTURES"], ["relabel.batch_size is 10 but there are 6 images"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_gives_a_one_line_error_and_writes_nothing(tmp_path, capsys, monkeypatch, pictures, recipes, kind):
    letters, words, expected = BAD[kind]
    chosen = [recipes["ab".index(letter)] for letter in letters]
    words = [str(pictures) if word == "PICTURES" else word for word in words]
    monkeypatch.chdir(tmp_path)
    assert go(*chosen, *words, "--output", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert all(word in line for word in expected), line
    assert mtimes(tmp_path) == {}


@pytest.mark.parametrize("seeds", ["", "a", "0,0", "-1", "1.5", "0,", str(2**63)])
def test_invalid_seeds_are_refused(tmp_path, capsys, monkeypatch, recipes, seeds):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        go(f"--seeds={seeds}", *recipes)
    assert end.value.code == 2
    assert "expected distinct whole numbers separated by commas" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_compare_reads_pictures_from_a_folder(tmp_path, capsys, monkeypatch, pictures, recipes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "q" * 34)
    words = (*recipes, *THREE, "--data", pictures, "--seeds", "0,1", "--output", tmp_path / "out", "--threads", "1")
    assert go(*words, prog="accelerate launch recipes/compare.py") == 0
    out = capsys.readouterr().out
    assert "sre2l" in out
    assert f"page: {tmp_path / 'out' / 'comparison.html'}" in out
    text = (tmp_path / "out" / "comparison.json").read_text()
    found = json.loads(text)
    assert found["data"] | {"license": ""} == {
        "source": "zoo", "classes": ["ant", "bee", "cat"], "train_count": 36, "test_count": 12, "license": "",
        "tested_on": "test images", "config": None, "revision": None,
    }  # fmt: skip
    assert [method["label"] for method in found["methods"]] == ["random real", "prism", "sre2l"]
    assert [row["seeds"] for row in found["full_data"]] == [[0, 1]]
    weak = [note for note in found["protocol"]["notes"] if "and chance is 33.3 %" in note]
    assert all(note.startswith("sre2l: ") or note in weak or "under-trained" in note for note in found["protocol"]["notes"])
    assert found["command"].startswith("accelerate launch recipes/compare.py prism.yaml sre2l.yaml")
    page, sheet = ((tmp_path / "out" / f"comparison.{kind}").read_text() for kind in ("html", "md"))
    for told in (text, page, sheet):
        assert str(tmp_path) not in told
        assert str(pictures.parent) not in told
        assert "hf_qqq" not in told
    assert list((tmp_path / "out" / "assets").iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    before = {path: time for path, time in mtimes(tmp_path / "out" / "runs").items() if "/work/students/" in path}
    shutil.rmtree(tmp_path / "out" / "assets")
    assert go(*words) == 0
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["command"].startswith(
        "prism-hf compare prism.yaml"
    )
    after = mtimes(tmp_path / "out" / "runs")
    assert {path: after[path] for path in before} == before
    again = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert again["scores"] == found["scores"]


def test_a_folder_with_other_files_is_refused_as_output(tmp_path, capsys, recipes):
    (tmp_path / "thesis.txt").write_text("mine")
    before = mtimes(tmp_path)
    assert go(recipes[0], "--output", tmp_path) == 2
    assert "is not empty and not a comparison" in capsys.readouterr().err
    assert mtimes(tmp_path) == before


def test_a_comparison_is_not_written_into_its_data(capsys, recipes, pictures):
    before = mtimes(pictures)
    assert go(recipes[0], *THREE, "--data", pictures, "--output", pictures / "out") == 2
    assert "is inside the data" in capsys.readouterr().err
    assert mtimes(pictures) == before


def test_splits_come_from_the_first_recipe_only(tmp_path, capsys, pictures, recipes):
    other = tmp_path / "other.yaml"
    other.write_text(dump_recipe(tiny("name=other", "data.train_split=practice", "data.image_column=photo")))
    assert go(recipes[0], other, *THREE, "--data", pictures, "--dry-run") == 0
    assert "other: 6 images" in capsys.readouterr().out


def test_an_error_names_the_protocol_when_its_verifier_is_a_teacher_elsewhere(tmp_path, capsys, recipes):
    judged = tmp_path / "judged.yaml"
    judged.write_text(
        dump_recipe(tiny("name=judged", "teachers.bn_pool=[]", "teachers.verifier=squeeze:test_efficientnet"))
    )
    assert go(judged, recipes[0], "--dry-run") == 2
    assert "prism under the protocol of judged: teachers: verifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/home/me/zoo", "zoo"),
        ("--data=/home/me/my zoo", "'--data=my zoo'"),
        ("data.source=/home/me/zoo", "data.source=zoo"),
        ("teachers.bn_pool=[local-dir:/home/me/a, local-dir:/home/me/b]", "'teachers.bn_pool=[local-dir:a, local-dir:b]'"),
        ("data.license=https://a.org/b", "data.license=https://a.org/b"),
        ("recipes/digits/prism_ipc10.yaml", "recipes/digits/prism_ipc10.yaml"),
        ("../zoo", "../zoo"),
        ("a.yaml; rm -r x", "'a.yaml; rm -r x'"),
    ],
)
def test_the_command_is_quoted_for_a_shell_and_has_no_local_paths(word, shown):
    assert public_word(word) == shown
