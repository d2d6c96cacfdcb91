import json

import pytest
from pipeline import add_card, one_line, save_timm, small_set

from prism_hf.errors import HubError
from prism_hf.hub.bundle import bundle_of, name_in, stale


@pytest.fixture
def folder(tmp_path):
    recipe, names, *_ = small_set(tmp_path / "set")
    add_card(tmp_path / "set", recipe, names)
    return tmp_path / "set"


def test_only_what_was_packaged_is_published(folder):
    (folder / "notes.txt").write_text("private")
    (folder / ".env").write_text("HF_TOKEN=hf_x")
    (folder / "assets").mkdir()
    (folder / "assets" / "grid.png").write_bytes(b"png")
    (folder / "assets" / "secret.png").write_bytes(b"png")
    bundle = bundle_of(folder)
    assert sorted(bundle.files) == [
        "assets/grid.png", "data/train-00000-of-00001.parquet", "provenance.json", "recipe.yaml",
        "views/train-00000-of-00001.parquet",
    ]  # fmt: skip
    assert (bundle.kind, bundle.name) == ("dataset", "digits-prism-ipc10")


def test_the_card_carries_the_address(folder):
    bundle = bundle_of(folder)
    assert 'repo = "a/b"\n' in bundle.readme("a/b", None)
    assert 'load_dataset(repo, split="train")' in bundle.readme("a/b", None)
    assert 'load_dataset(repo, revision="v2", "views"' in bundle.readme("a/b", "v2")


@pytest.mark.parametrize(
    "kind", ["nothing", "a run", "a damaged set", "a model without weights", "a bare model", "no folder"]
)
def test_a_folder_that_cannot_be_pushed_gives_a_one_line_error(folder, tmp_path, kind):
    place = tmp_path / "other"
    if kind == "nothing":
        place.mkdir()
    elif kind == "a run":
        place.mkdir()
        folder.rename(place / "dataset")
    elif kind == "a damaged set":
        (folder / "recipe.yaml").write_text("name: x")
        place = folder
    elif kind == "a model without weights":
        place.mkdir()
        (place / "squeeze.json").write_text("{}")
    elif kind == "a bare model":
        save_timm(place)
    with pytest.raises(HubError) as error:
        bundle_of(place)
    assert str(place) in one_line(error)


@pytest.mark.parametrize("path", ["recipe.yaml", "data"])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, path):
    (folder / path).rename(tmp_path / "elsewhere")
    (folder / path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HubError, match="leads out of the folder"):
        bundle_of(folder)


PROVENANCE = {"format_version": 1, "recipe": "x", "teachers": [], "files": {"a": {"sha256": "0" * 64, "bytes": 1}}}
SOURCE = {"id": "digits", "on_hub": False, "revision": None, "license": "mit"}
OLDER_TEACHER = {
    "teacher": "squeeze:a", "fingerprint": "00ed", "train_content": "7e3f", "test_top1": 0.25, "wall_time_s": 0.7,
    "settings": {"seed": 0, "data": "numbers", "steps": 5},
}  # fmt: skip
STUDENT = {
    "kind": "student", "architecture": "a", "labels": "soft", "epochs": 4, "channels": 3, "source": SOURCE,
    "test": {"id": "digits", "split": "test"}, "recipe_fingerprint": "f", "settings": {}, "seed": 3, "test_top1": 0.5,
    "test_count": 9, "dataset": {"name": "x", "content": "01", "images": 4, "hub_id": None},
}  # fmt: skip


@pytest.mark.parametrize(
    ("label", "content", "name"),
    [
        ("provenance.json", PROVENANCE, "x"),
        ("provenance.json", PROVENANCE | {"images": "distilled"}, "x"),
        ("provenance.json", PROVENANCE | {"images": "random_real"}, "x (random real images)"),
        ("provenance.json", PROVENANCE | {"format_version": 2, "later": [1]}, "x"),
        ("provenance.json", {"recipe": "x"}, None),
        ("provenance.json", PROVENANCE | {"format_version": "1"}, None),
        ("provenance.json", b"[]", None),
        ("provenance.json", b"\xff", None),
        ("squeeze.json", OLDER_TEACHER | {"source": SOURCE}, "squeeze:a of digits"),
        ("squeeze.json", OLDER_TEACHER, "squeeze:a of numbers"),
        ("squeeze.json", {}, None),
        ("student.json", STUDENT, "student a of x"),
        ("student.json", {"architecture": "a"}, None),
        ("student.json", b"nonsense", None),
    ],
)
def test_the_occupant_of_a_repo_is_named_from_its_files(label, content, name):
    assert name_in(label, content if isinstance(content, bytes) else json.dumps(content).encode()) == name


def test_only_files_that_would_mix_with_the_tables_are_stale(folder):
    there = [
        *bundle_of(folder).files, "data/train-00001-of-00009.parquet", "views/train-x.parquet", "assets/diversity.png",
        "data/test-0.parquet", "data/train-notes.csv", "data/train-dir/x.parquet", "data/sub/train-0.parquet", "LICENSE",
        "README.md", ".gitattributes",
    ]  # fmt: skip
    assert stale(bundle_of(folder), there) == [
        "assets/diversity.png", "data/train-00001-of-00009.parquet", "data/train-dir/x.parquet", "data/train-notes.csv",
        "views/train-x.parquet",
    ]  # fmt: skip


def test_a_listed_file_outside_the_folder_is_refused(folder):
    path = folder / "provenance.json"
    value = json.loads(path.read_text())
    value["files"]["../../etc/passwd"] = {"sha256": "0" * 64, "bytes": 1}
    path.write_text(json.dumps(value))
    with pytest.raises(HubError, match="outside the folder"):
        bundle_of(folder)
