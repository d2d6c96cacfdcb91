"""The stage package: complete folders, and tables that are written once."""

import errno
import os
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from pipeline import copy_run, file_limit, make, mtimes, one_line, run_in, sha_tree, tiny

from prism_hf.dataset.provenance import check_folder
from prism_hf.errors import OutputError, StageError
from prism_hf.images.source import load_source
from prism_hf.run.context import Loaded
from prism_hf.run.package import package, partial_facts
from prism_hf.run.relabel import image_sets
from prism_hf.runtime.store import read_json, read_proof, seal_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TABLE = "train-00000-of-00001.parquet"
PARTS = {"distilled": "dataset", "random_real": "control"}
TABLES = [f"{part}/{TABLE}" for part in ("data", "views")]


@pytest.fixture
def copied(finished_run, tmp_path):
    return copy_run(finished_run, tmp_path / "copy")


def again(folder, finished_run, *overrides, wanted=("package",)):
    return make(folder, finished_run / "teachers", *overrides, wanted=wanted)


def test_both_folders_have_hashes_of_their_files(finished_run):
    for name in PARTS.values():
        assert check_folder(finished_run / name).differences == ()
    assert not list(finished_run.rglob(".draft-*"))


def test_a_correct_folder_is_not_changed(finished_run, copied):
    before = mtimes(copied / "dataset") | mtimes(copied / "control")
    again(copied, finished_run)
    assert mtimes(copied / "dataset") | mtimes(copied / "control") == before


# -- tables are written once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", PARTS)
def test_a_packaged_table_is_the_file_that_the_stage_relabel_wrote(finished_run, name, table):
    ours, shipped = finished_run / "work" / name / table, finished_run / PARTS[name] / table
    assert ours.samefile(shipped)
    assert shipped.stat().st_nlink == 2


def edit(path):
    """Write another value of the same length into the open file, as some editors do."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_edited_in_place_is_detected_and_recreated(finished_run, copied, table, caplog):
    path, shard = copied / "dataset" / table, copied / "work" / "distilled" / table
    edit(path)
    assert shard.samefile(path)
    shutil.copytree(copied, copied.with_name("other"))
    before = mtimes(copied / "control")
    again(copied, finished_run, wanted=("relabel", "package"))
    assert f"{shard} was changed after it was written; set aside as {TABLE}.aside-1, to be recreated" in caplog.messages
    assert any(line.startswith(f"{copied / 'dataset'}: ") and "packaged again" in line for line in caplog.messages)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")
    assert path.samefile(shard)
    assert not path.samefile(shard.with_name(f"{TABLE}.aside-1"))
    assert mtimes(copied / "control") == before
    with pytest.raises(StageError, match="run --stage relabel first"):
        again(copied.with_name("other"), finished_run)


def test_tables_are_copied_where_the_file_system_has_no_hard_links(finished_run, copied, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    shutil.rmtree(copied / "dataset")
    again(copied, finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")
    path, shard = copied / "dataset" / TABLES[1], copied / "work" / "distilled" / TABLES[1]
    assert not path.samefile(shard)
    edit(path)
    again(copied, finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset"), "copied again: the shard is complete"
    shutil.rmtree(copied / "dataset")
    before = mtimes(copied)
    with file_limit(4000), pytest.raises(OutputError) as error:  # less than the size of a table
        again(copied, finished_run)
    assert "free some disk space" in one_line(error)
    changed = {path for path in before.items() ^ mtimes(copied).items() if "times.json" not in path[0]}
    assert {path for path, _ in changed} <= {str(copied / "recipe.yaml")}, "no draft is left"


# -- incorrect folders ------------------------------------------------------------------------------------------------


def emptied(path):
    """Put another file in place of a table, as `mv` and `git` do."""
    path.unlink()
    path.write_bytes(b"x")


RECORD = ("work", "distilled", "provenance.json")
DAMAGE = {
    "a table replaced": lambda folder: emptied(folder / "data" / TABLE),
    "a table gone": lambda folder: (folder / "views" / TABLE).unlink(),
    "a table too many": lambda folder: shutil.copy(folder / "data" / TABLE, folder / "data" / "train-1.parquet"),
    "provenance edited": lambda folder: (folder / "provenance.json").write_text("{}"),
    "provenance garbage": lambda folder: (folder / "provenance.json").write_text("{"),
    "provenance gone": lambda folder: (folder / "provenance.json").unlink(),
    "recipe edited": lambda folder: (folder / "recipe.yaml").write_text("name: x"),
    "everything gone": shutil.rmtree,
    "record gone": lambda folder: folder.parent.joinpath(*RECORD).unlink(),
    "record garbage": lambda folder: folder.parent.joinpath(*RECORD).write_text("{"),
    "record without its seal": lambda folder: seal_of(folder.parent.joinpath(*RECORD)).unlink(),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_an_incorrect_folder_is_packaged_again_with_the_same_bytes(finished_run, copied, kind):
    DAMAGE[kind](copied / "dataset")
    before = mtimes(copied / "control") | mtimes(copied / "work" / "distilled" / "views")
    again(copied, finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")
    assert mtimes(copied / "control") | mtimes(copied / "work" / "distilled" / "views") == before


@pytest.mark.parametrize("override", ["name=renamed", "evaluation.lr=0.5"])
def test_other_text_in_the_recipe_reaches_the_folder(finished_run, copied, override):
    before = sha_tree(copied / "work" / "distilled" / "views")
    again(copied, finished_run, override)
    for name in PARTS.values():
        text = (copied / name / "recipe.yaml").read_text()
        assert text != (finished_run / name / "recipe.yaml").read_text()
        assert check_folder(copied / name).differences == ()
    assert sha_tree(copied / "work" / "distilled" / "views") == before


def test_files_that_others_put_into_the_folder_are_kept(finished_run, copied):
    for name in ("notes.txt", "extra/more.txt", "data/README.txt"):
        (copied / "dataset" / name).parent.mkdir(exist_ok=True)
        (copied / "dataset" / name).write_text("precious")
    again(copied, finished_run, "name=renamed")
    for name in ("notes.txt", "extra/more.txt", "data/README.txt"):
        assert (copied / "dataset" / name).read_text() == "precious"


@pytest.mark.parametrize("gone", ["file", "seal"])
def test_lost_pixels_are_decoded_again_for_the_grid(finished_run, copied, gone):
    """The pixels are not part of the package."""
    pixels = copied / "work" / "distilled" / "pixels.npy"
    (pixels if gone == "file" else seal_of(pixels)).unlink()
    shutil.rmtree(copied / "dataset")
    again(copied, finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")


@pytest.mark.parametrize("limit", [0, 600, 2000, 6000])
def test_a_full_disk_leaves_the_old_folder_complete_and_no_draft(finished_run, copied, limit):
    """The tables need no space; recipe, provenance, pictures and card do."""
    run = run_in(copied, finished_run / "teachers", "name=renamed")
    assert len(image_sets(run)) == 2  # the data is loaded
    run.teachers(run.recipe.all_teachers)
    before = mtimes(copied)
    with file_limit(limit), pytest.raises(OutputError) as error:
        package(run)
    assert "free some disk space" in one_line(error)
    assert mtimes(copied) == before


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("table", TABLES)
def test_unlabeled_images_are_not_packaged(finished_run, copied, name, table):
    seal_of(copied / "work" / name / table).unlink()
    before = mtimes(copied / "dataset")
    with pytest.raises(StageError) as error:
        again(copied, finished_run)
    assert "--stage relabel" in one_line(error)
    assert mtimes(copied / "dataset") == before


def test_a_run_without_a_control_has_no_control_folder(finished_run, tmp_path):
    make(tmp_path / "run", finished_run / "teachers", with_control=False)
    assert not (tmp_path / "run" / "control").exists()
    assert not (tmp_path / "run" / "work" / "random_real").exists()
    assert sha_tree(tmp_path / "run" / "dataset") == sha_tree(finished_run / "dataset")


def test_missing_images_are_counted(finished_run, copied):
    run = run_in(copied, finished_run / "teachers")
    assert partial_facts(run, tiny().num_images) is None
    assert partial_facts(run, 10) == {"images": 10, "of": 20, "failed_jobs": []}


def test_the_record_of_a_folder_is_its_provenance_and_names_its_inputs(finished_run):
    for name, part in PARTS.items():
        record = finished_run / "work" / name / "provenance.json"
        assert record.read_bytes() == (finished_run / part / "provenance.json").read_bytes()
        assert len(read_proof(record).key) == 64


def test_renamed_classes_reach_table_and_card(finished_run, tmp_path):
    """With the same images and labels, only the table of images contains the names, so the views are not recreated."""
    folder, recipe = tmp_path / "run", tiny()
    shutil.copytree(finished_run, folder)
    names = tuple(f"digit {label}" for label in range(10))
    loaded = Loaded(data={recipe.data: replace(load_source(recipe.data), class_names=names)})
    before = mtimes(folder / "work" / "distilled" / "views") | mtimes(folder / "work" / "jobs")
    make(folder, finished_run / "teachers", loaded=loaded)
    assert mtimes(folder / "work" / "distilled" / "views") | mtimes(folder / "work" / "jobs") == before
    assert '"digit 7"' in pq.read_schema(folder / "dataset" / "data" / TABLE).metadata[b"huggingface"].decode()
    assert "digit 7" in (folder / "dataset" / "README.md").read_text()


def test_the_training_images_of_each_class_reach_provenance_and_cards(finished_run):
    counts = [133, 136, 133, 137, 136, 136, 136, 134, 131, 135]
    for name in PARTS.values():
        assert read_json(finished_run / name / "provenance.json")["source"]["images_per_class"] == counts
    card = (finished_run / "dataset" / "README.md").read_text(encoding="utf-8")
    assert "1,347 training images. The smallest class is *8* (131 images), the largest is *3* (137)." in card
    assert "\n8. 8 (131)\n9. 9 (135)\n\n</details>" in card
    assert "made from scikit-learn's digits" in card
