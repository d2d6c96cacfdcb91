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
def test_a_folder_that_cannot_be_pushed_is_one_line(folder, tmp_path, kind):
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


@pytest.mark.parametrize(
    ("label", "content", "name"),
    [
        ("provenance.json", b'{"format_version": 1, "files": {"a": 1}, "recipe": "x"}', "x"),
        ("provenance.json", b'{"format_version": 1, "files": {"a": 1}, "recipe": "x", "images": "distilled"}', "x"),
        (
            "provenance.json",
            b'{"format_version": 1, "files": {"a": 1}, "recipe": "x", "images": "random_real"}',
            "x (random real images)",
        ),
        ("provenance.json", b'{"recipe": "x"}', None),
        ("provenance.json", b'{"format_version": "1", "files": {"a": 1}, "recipe": "x"}', None),
        ("provenance.json", b"[]", None),
        ("provenance.json", b"\xff", None),
        ("squeeze.json", b'{"teacher": "squeeze:a", "source": {"id": "digits"}}', "squeeze:a of digits"),
        ("squeeze.json", b'{"teacher": "squeeze:a", "settings": {"data": "digits"}}', "squeeze:a of digits"),
        ("squeeze.json", b"{}", None),
        ("student.json", b'{"architecture": "a", "dataset": {"name": "x"}}', "student a of x"),
        ("student.json", b'{"architecture": "a"}', None),
        ("student.json", b"nonsense", None),
    ],
)
def test_what_a_repo_holds(label, content, name):
    assert name_in(label, content) == name


def test_tables_that_would_be_mixed_in_are_stale_and_others_are_not(folder):
    there = [
        *bundle_of(folder).files, "data/train-00001-of-00009.parquet", "views/train-x.parquet", "assets/diversity.png",
        "data/test-0.parquet", "data/train-notes.csv", "data/train-dir/x.parquet", "data/sub/train-0.parquet", "LICENSE",
        "README.md", ".gitattributes",
    ]  # fmt: skip
    assert stale(bundle_of(folder), there) == [
        "assets/diversity.png", "data/train-00001-of-00009.parquet", "data/train-dir/x.parquet", "data/train-notes.csv",
        "views/train-x.parquet",
    ]  # fmt: skip


def test_a_listed_file_that_provenance_invents_is_refused(folder):
    path = folder / "provenance.json"
    value = json.loads(path.read_text())
    value["files"]["../../etc/passwd"] = {"sha256": "0" * 64, "bytes": 1}
    path.write_text(json.dumps(value))
    with pytest.raises(HubError, match="outside the folder"):
        bundle_of(folder)
