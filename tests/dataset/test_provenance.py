import json
import shutil
from pathlib import Path

import pytest
import torch
from pipeline import one_line, save_timm, sha_tree, small_set

from prism_hf.dataset.provenance import Provenance, data_files, read_provenance, versions, write_provenance
from prism_hf.errors import DataError
from prism_hf.models.load import load_teachers
from prism_hf.recipe.yaml_file import load_recipe, public_recipe
from prism_hf.runtime.store import sha256_of

NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    root = tmp_path_factory.mktemp("secret-home")
    folder, teacher_folder = root / "set", save_timm(root / "teacher", classes=4, names=NAMES)
    recipe, names, *_ = small_set(folder, names=NAMES)
    source = f"data.source={root / 'private' / 'flowers'}"
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    path = root / "recipe.yaml"
    path.write_text((folder / "recipe.yaml").read_text())
    name = f"local-dir:{teacher_folder}"
    recipe = public_recipe(load_recipe(path, [source, f"teachers.logit={name}", f"relabel.teachers=['{name}']"]))
    teachers = load_teachers([name], device=torch.device("cpu"))
    assert recipe.teachers.logit == f"local-dir:{teacher_folder.name}"
    name, teacher = recipe.teachers.logit, teachers[name]
    teachers = {name: teacher}
    write_provenance(
        folder, recipe=recipe, teachers=teachers, source_revision="abc", source_on_hub=True, squeezed_top1={name: 0.5},
        hardware={"device": "cpu", "threads": 1, "precision": "float32"},
    )  # fmt: skip
    return root, folder, recipe, teacher, json.loads((folder / "provenance.json").read_text())


def test_provenance_has_a_hash_for_every_file(described):
    _, folder, *_, provenance = described
    listed = {name: entry["sha256"] for name, entry in provenance["files"].items()}
    assert listed == {name: sha for name, sha in sha_tree(folder).items() if name != "provenance.json"}
    assert all((folder / name).stat().st_size == entry["bytes"] for name, entry in provenance["files"].items())
    assert set(listed) == {"recipe.yaml", "data/train-00000-of-00001.parquet", "views/train-00000-of-00001.parquet"}


def test_provenance_names_the_producer_and_the_inputs(described):
    *_, recipe, teacher, provenance = described
    assert provenance["recipe_fingerprint"] == recipe.fingerprint()
    assert provenance["source"] == {
        "id": "flowers",
        "on_hub": True,
        "revision": "abc",
        "license": "CC BY 4.0",
    }
    assert provenance["seed"] == 0
    assert provenance["student_seeds"] == [0, 1, 2]
    (described_teacher,) = provenance["teachers"]
    assert described_teacher["weights_sha256"] == teacher.weights_sha256
    assert described_teacher["roles"] == ["logit", "relabel"]
    assert described_teacher["test_top1"] == 0.5
    assert {"python", "torch", "timm", "datasets", "prism-hf"} <= set(provenance["versions"])


def test_provenance_contains_no_path_token_or_time(described, monkeypatch):
    root, folder, recipe, teacher, _ = described
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    before = (folder / "provenance.json").read_bytes()
    write_provenance(
        folder, recipe=recipe, teachers={recipe.teachers.logit: teacher}, source_revision="abc", source_on_hub=True,
        squeezed_top1={recipe.teachers.logit: 0.5}, hardware={"device": "cpu", "threads": 1, "precision": "float32"},
    )  # fmt: skip
    assert (folder / "provenance.json").read_bytes() == before
    text = before.decode()
    assert "hf_secret" not in text
    assert str(root) not in text, "an absolute path"
    assert "/home/" not in text


def test_pictures_card_and_hidden_files_have_no_hash(tmp_path):
    for name in ("README.md", "provenance.json", "assets/grid.png", ".cache/x", "data/.draft", "data/a.parquet", "x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in data_files(tmp_path)] == ["data/a.parquet", "x.txt"]


# -- bytes ------------------------------------------------------------------------------------------------------------

TEXT = """\
{
  "format_version": 1,
  "recipe": "digits-prism-ipc10",
  "images": "random_real",
  "partial": {
    "images": 10,
    "of": 12,
    "failed_jobs": [
      0
    ]
  },
  "recipe_fingerprint": "%(fingerprint)s",
  "seed": 0,
  "student_seeds": [
    0,
    1,
    2
  ],
  "source": {
    "id": "flowers",
    "on_hub": true,
    "revision": "abc",
    "license": "CC BY 4.0"
  },
  "teachers": [
    {
      "name": "%(name)s",
      "roles": [
        "logit",
        "relabel"
      ],
      "architecture": "test_byobnet",
      "revision": null,
      "license": "apache-2.0",
      "weights_sha256": "%(weights)s",
      "test_top1": 0.5
    }
  ],
  "versions": %(versions)s,
  "hardware": {
    "device": "cpu",
    "threads": 1,
    "precision": "float32"
  },
  "files": {
    "data/train-00000-of-00001.parquet": {
      "sha256": "%(data)s",
      "bytes": %(data_bytes)d,
      "rows": 12
    },
    "recipe.yaml": {
      "sha256": "%(recipe)s",
      "bytes": %(recipe_bytes)d
    },
    "views/train-00000-of-00001.parquet": {
      "sha256": "%(views)s",
      "bytes": %(views_bytes)d,
      "rows": 36
    }
  }
}
"""


@pytest.mark.parametrize("partial", [None, {"images": 10, "of": 12, "failed_jobs": [0]}])
def test_the_bytes_are_pinned(described, tmp_path, partial):
    _, folder, recipe, teacher, _ = described
    folder, name = Path(shutil.copytree(folder, tmp_path / "set")), recipe.teachers.logit
    write_provenance(
        folder, recipe=recipe, teachers={name: teacher}, source_revision="abc", source_on_hub=True,
        squeezed_top1={name: 0.5}, hardware={"device": "cpu", "threads": 1, "precision": "float32"}, images="random_real",
        partial=partial,
    )  # fmt: skip
    files = {key: folder / f"{key}/train-00000-of-00001.parquet" for key in ("data", "views")}
    files["recipe"] = folder / "recipe.yaml"
    values = {key: sha256_of(path) for key, path in files.items()}
    values |= {f"{key}_bytes": path.stat().st_size for key, path in files.items()}
    values |= {"fingerprint": recipe.fingerprint(), "name": name, "weights": teacher.weights_sha256}
    values["versions"] = json.dumps(versions(), indent=2).replace("\n", "\n  ")
    expected = TEXT % values
    if partial is None:
        start, end = expected.index('  "partial"'), expected.index('  "recipe_fingerprint"')
        expected = expected[:start] + expected[end:]
    assert (folder / "provenance.json").read_text() == expected


# -- reading ----------------------------------------------------------------------------------------------------------


def test_reading_and_writing_again_gives_the_same_bytes(described, tmp_path):
    path = described[1] / "provenance.json"
    Provenance.read(path).write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_file_of_an_older_version_is_read(described, tmp_path):
    """The first version did not record the location of the source, the images, or the number of rows per table."""
    *_, older = described
    older = {key: value for key, value in older.items() if key not in ("images", "partial")}
    older["source"] = {key: value for key, value in older["source"].items() if key != "on_hub"}
    older["files"] = {name: {"sha256": e["sha256"], "bytes": e["bytes"]} for name, e in older["files"].items()}
    (tmp_path / "provenance.json").write_text(json.dumps(older))
    provenance = read_provenance(tmp_path / "provenance.json")
    assert (provenance.images, provenance.partial, provenance.source.on_hub) == ("distilled", None, False)
    assert provenance.files["data/train-00000-of-00001.parquet"].rows is None
    assert provenance.title == "digits-prism-ipc10"
    assert provenance.plain() == older


def test_a_file_of_a_later_version_keeps_its_unknown_fields(described, tmp_path):
    *_, later = described
    later = later | {"format_version": 2, "moon": {"phase": [1, "full"]}}
    (tmp_path / "provenance.json").write_text(json.dumps(later))
    assert read_provenance(tmp_path / "provenance.json").plain() == later


def test_only_fields_that_programs_use_are_required(tmp_path):
    least = {"format_version": 1, "recipe": "x", "teachers": [{"name": "a", "weights_sha256": "0"}], "files": {}}
    path = tmp_path / "provenance.json"
    path.write_text(json.dumps(least))
    assert read_provenance(path).teachers[0].name == "a"
    for key in least:
        path.write_text(json.dumps({name: value for name, value in least.items() if name != key}))
        with pytest.raises(DataError, match=f"provenance.json has no '{key}'"):
            read_provenance(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read (No such file"),
        ("[]", "cannot be read"),
        ('{"format_version": "1"}', "has '1' as 'format_version'"),
        ('{"format_version": 1, "recipe": "x", "teachers": [{}]}', "has no 'teachers.0.name'"),
        ('{"format_version": 1, "recipe": "x", "teachers": [], "files": {"\\u001b": {}}}', "has no 'files.\\x1b.sha256'"),
    ],
)
def test_invalid_content_gives_a_one_line_error(tmp_path, text, words):
    if text is not None:
        (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(DataError) as error:
        read_provenance(tmp_path / "provenance.json")
    assert words in one_line(error)
    assert "package or download the dataset again" in one_line(error)
