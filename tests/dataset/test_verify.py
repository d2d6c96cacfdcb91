import json

import pyarrow.parquet as pq
import pytest
from pipeline import add_card, small_set

from prism_hf.dataset.provenance import check_folder, verify
from prism_hf.runtime.store import sha256_of

TABLE = "data/train-00000-of-00001.parquet"
VIEWS = "views/train-00000-of-00001.parquet"


@pytest.fixture
def folder(tmp_path):
    recipe, names, *_ = small_set(tmp_path / "set")
    add_card(tmp_path / "set", recipe, names)
    return tmp_path / "set"


def edit(folder, change):
    path = folder / "provenance.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def vouch(folder, name):
    """Update provenance.json to match a changed file, so that only the other checks can notice the change."""
    path = folder / name
    edit(folder, lambda v: v["files"][name].update(sha256=sha256_of(path), bytes=path.stat().st_size))


def fewer_rows(folder, name):
    pq.write_table(pq.read_table(folder / name).slice(1), folder / name)
    vouch(folder, name)


def test_a_good_folder_has_no_differences(folder):
    found = check_folder(folder)
    assert found.differences == ()
    assert found.files == 3
    assert found.rows == {"default": 12, "views": 36}
    assert verify(folder) == found


def test_a_folder_without_recorded_rows_is_checked_against_its_card(folder):
    edit(folder, lambda v: [facts.pop("rows", None) for facts in v["files"].values()])
    assert check_folder(folder).differences == ()
    fewer_rows(folder, TABLE)
    assert any("README.md" in line for line in check_folder(folder).differences)


DAMAGE = {
    "a flipped bit": (lambda f: flip(f / TABLE), TABLE),
    "a flipped bit in the recipe": (lambda f: flip(f / "recipe.yaml"), "recipe.yaml"),
    "a short table": (lambda f: (f / TABLE).write_bytes((f / TABLE).read_bytes()[:-9]), "bytes, expected"),
    "a missing table": (lambda f: (f / VIEWS).unlink(), "missing"),
    "a table too many": (lambda f: (f / "data/train-00001-of-00002.parquet").write_bytes(b"x"), "does not list"),
    "fewer images": (lambda f: fewer_rows(f, TABLE), "11 rows, expected 12"),
    "fewer views": (lambda f: fewer_rows(f, VIEWS), "35 rows, expected 36"),
    "no table at all": (lambda f: ((f / TABLE).write_bytes(b"no"), vouch(f, TABLE)), "not readable as Parquet"),
    "no provenance": (lambda f: (f / "provenance.json").unlink(), "provenance.json"),
    "broken provenance": (lambda f: (f / "provenance.json").write_text("{"), "provenance.json"),
    "a list as provenance": (lambda f: (f / "provenance.json").write_text("[]"), "provenance.json"),
    "a later format": (lambda f: edit(f, lambda v: v.update(format_version=99)), "format version 99"),
    "a hash that is none": (lambda f: edit(f, lambda v: v["files"][TABLE].update(sha256="x")), "no valid SHA-256"),
    "a file outside": (lambda f: edit(f, lambda v: v["files"].update({"../x": v["files"][TABLE]})), "outside the folder"),
    "an absolute file": (lambda f: edit(f, lambda v: v["files"].update({"/etc/passwd": v["files"][TABLE]})), "outside"),
    "no card": (lambda f: (f / "README.md").unlink(), "README.md"),
    "a card without counts": (lambda f: (f / "README.md").write_text("---\nlicense: mit\n---\n"), "README.md"),
    "a card that points elsewhere": (
        lambda f: (f / "README.md").write_text(
            (f / "README.md").read_text().replace("path: views/train-*", "path: views/x-*")
        ),
        "does not point to views/train-*",
    ),
    "a card with another type": (
        lambda f: (f / "README.md").write_text((f / "README.md").read_text().replace("dtype: bool", "dtype: int8")),
        "columns or types that differ",
    ),
    "a card in the list of files": (
        lambda f: edit(f, lambda v: v["files"].update({"README.md": v["files"][TABLE]})),
        "not part of a dataset",
    ),
    "a hidden file": (lambda f: edit(f, lambda v: v["files"].update({".git/config": v["files"][TABLE]})), "not part"),
    "a name that rings": (lambda f: edit(f, lambda v: v["files"].update({"a\x1bb": v["files"][TABLE]})), "not part"),
    "a card with other counts": (
        lambda f: (f / "README.md").write_text(
            (f / "README.md").read_text().replace("num_examples: 36", "num_examples: 35")
        ),
        "states 35 rows",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported(folder, damage):
    act, words = DAMAGE[damage]
    act(folder)
    differences = check_folder(folder).differences
    assert any(words in line for line in differences), differences
    assert all("\n" not in line for line in differences)
