import json
import shutil
from pathlib import Path

import pytest
from pipeline import file_limit, make, mtimes, one_line, sha_tree, stages, tiny

from prism_hf.dataset.verify import check_folder
from prism_hf.errors import OutputError, StageError
from prism_hf.recipe.plan import plan_jobs
from prism_hf.run.packager import Packager, partial_facts
from prism_hf.runtime.store import seal_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def copied(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def again(folder, finished_run, *overrides):
    return make(folder, finished_run / "teachers", *overrides, wanted=["package"])


def test_both_folders_vouch_for_their_files(finished_run):
    for name in ("dataset", "control"):
        assert check_folder(finished_run / name).differences == ()
    assert not list(finished_run.rglob(".draft-*"))


def test_a_folder_that_is_as_it_should_be_is_left_alone(finished_run, copied):
    before = mtimes(copied / "dataset") | mtimes(copied / "control")
    again(copied, finished_run)
    assert mtimes(copied / "dataset") | mtimes(copied / "control") == before


DAMAGE = {
    "a table edited": lambda folder: (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"x"),
    "a table gone": lambda folder: (folder / "views" / "train-00000-of-00001.parquet").unlink(),
    "provenance edited": lambda folder: (folder / "provenance.json").write_text("{}"),
    "provenance garbage": lambda folder: (folder / "provenance.json").write_text("{"),
    "provenance gone": lambda folder: (folder / "provenance.json").unlink(),
    "recipe edited": lambda folder: (folder / "recipe.yaml").write_text("name: x"),
    "everything gone": shutil.rmtree,
    "record gone": lambda folder: (folder.parent / "work" / "distilled" / "packaged.json").unlink(),
    "record garbage": lambda folder: (folder.parent / "work" / "distilled" / "packaged.json").write_text("{"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_what_is_not_as_it_should_be_is_packaged_again_with_the_same_bytes(finished_run, copied, kind):
    DAMAGE[kind](copied / "dataset")
    control = mtimes(copied / "control")
    again(copied, finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")
    assert mtimes(copied / "control") == control


@pytest.mark.parametrize("override", ["name=renamed", "evaluation.lr=0.5"])
def test_other_words_of_the_recipe_reach_the_folder(finished_run, copied, override):
    again(copied, finished_run, override)
    for name in ("dataset", "control"):
        text = (copied / name / "recipe.yaml").read_text()
        assert text != (finished_run / name / "recipe.yaml").read_text()
        assert check_folder(copied / name).differences == ()


@pytest.mark.parametrize("limit", [0, 2000, 6000])
def test_a_full_disk_leaves_the_old_folder_whole_and_no_draft(finished_run, copied, limit):
    made = stages(copied, finished_run / "teachers", "name=renamed")
    packager = Packager(made)
    before = mtimes(copied)
    with file_limit(limit), pytest.raises(OutputError) as error:
        packager.dataset()
    assert "make space" in one_line(error)
    assert mtimes(copied) == before


@pytest.mark.parametrize("file", ["encoded.bin", "rows.npy", "teacher_logits.npy", "epoch-00001.parquet"])
def test_unlabelled_images_are_not_packaged(finished_run, copied, file):
    seal_of(copied / "work" / "distilled" / file).unlink()
    before = mtimes(copied / "dataset")
    with pytest.raises(StageError) as error:
        again(copied, finished_run)
    assert "--stage relabel" in one_line(error)
    assert mtimes(copied / "dataset") == before


def test_without_a_control_there_is_no_folder_for_it(finished_run, copied):
    shutil.rmtree(copied / "control")
    seal_of(copied / "work" / "random_real" / "pixels.npy").unlink()
    again(copied, finished_run)
    assert not (copied / "control").exists()


def test_what_is_missing_is_counted(finished_run, copied):
    made = stages(copied, finished_run / "teachers")
    jobs = plan_jobs(tiny())
    assert partial_facts(made, jobs) is None
    assert partial_facts(made, jobs[1:]) == {"images": 10, "of": 20, "failed_jobs": []}


def test_the_record_names_what_the_folder_was_made_from(finished_run):
    record = json.loads((finished_run / "work" / "distilled" / "packaged.json").read_text())
    assert set(record) == {"key", "provenance", "sha256"}
