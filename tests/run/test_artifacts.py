import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from pipeline import make, mtimes, sha_tree, stages, tiny
from safetensors.torch import load_file, save_file

from prism_hf.errors import DamagedError
from prism_hf.models.squeeze import teacher_folder
from prism_hf.models.teacher import digest_of_tensors
from prism_hf.recipe.plan import plan_jobs
from prism_hf.run.artifacts import DISTILLED, RANDOM_REAL, StoredImages, Work, read_failed
from prism_hf.runtime.store import SEAL, seal_of, write_json
from prism_hf.runtime.tensors import write_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETS = (DISTILLED, RANDOM_REAL)
SHARED = ("encoded.bin", "pixels.npy", "rows.npy", "teacher_logits.npy", "epoch-00000.parquet", "epoch-00001.parquet")
FILES = [f"jobs/job-{job:05d}.safetensors" for job in range(2)] + [f"{name}/{file}" for name in SETS for file in SHARED]


@pytest.fixture
def copied(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def kept(folder):
    """SHA-256 of what the stages leave for each other, without what was set aside, and the notes of times."""
    return {name: sha for name, sha in sha_tree(folder / "work").items() if ".aside-" not in name and name != "times.json"}


def again(folder, finished_run, caplog, *overrides, **more):
    with caplog.at_level(logging.WARNING, "prism_hf"):
        make(folder, finished_run / "teachers", *overrides, **more)
    return [record.getMessage() for record in caplog.records if record.name.startswith("prism_hf")]


DAMAGE = {
    "truncated by one byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one bit": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "seal edited": lambda path: flip(seal_of(path)),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_file_of_any_kind_is_named_set_aside_and_made_again(finished_run, copied, caplog, kind):
    for file in FILES:
        DAMAGE[kind](copied / "work" / file)
    lines = again(copied, finished_run, caplog)
    for file in FILES:
        named = [line for line in lines if line.startswith(str(copied / "work" / file))]
        assert len(named) == 1, file
        assert f"set aside as {Path(file).name}.aside-1, it is made again" in named[0]
        assert (copied / "work" / f"{file}.aside-1").exists() == (kind != "removed")
        assert (copied / "work" / f"{file}.aside-1{SEAL}").exists()
    assert kept(copied) == kept(finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")
    assert sha_tree(copied / "control") == sha_tree(finished_run / "control")


@pytest.mark.parametrize("file", ["jobs/job-00001.safetensors", "distilled/rows.npy", "random_real/epoch-00001.parquet"])
def test_a_file_without_its_seal_is_made_again_without_a_word(finished_run, copied, caplog, file):
    seal_of(copied / "work" / file).unlink()
    assert again(copied, finished_run, caplog) == []
    assert kept(copied) == kept(finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")


SWAPS = {
    "jobs": ("jobs/job-00000.safetensors", "jobs/job-00001.safetensors"),
    "epochs": ("distilled/epoch-00000.parquet", "distilled/epoch-00001.parquet"),
    "images of the sets": ("distilled/encoded.bin", "random_real/encoded.bin"),
    "pixels of the sets": ("distilled/pixels.npy", "random_real/pixels.npy"),
    "rows of the sets": ("distilled/rows.npy", "random_real/rows.npy"),
    "labels of the sets": ("distilled/teacher_logits.npy", "random_real/teacher_logits.npy"),
    "epochs of the sets": ("distilled/epoch-00000.parquet", "random_real/epoch-00000.parquet"),
}


@pytest.mark.parametrize("kind", list(SWAPS))
def test_files_in_the_place_of_each_other_are_noticed_with_their_seals(finished_run, copied, caplog, kind):
    one, two = (copied / "work" / file for file in SWAPS[kind])
    for path, from_ in ((one, SWAPS[kind][1]), (two, SWAPS[kind][0])):
        shutil.copyfile(finished_run / "work" / from_, path)
        shutil.copyfile(seal_of(finished_run / "work" / from_), seal_of(path))
    lines = again(copied, finished_run, caplog)
    for path in (one, two):
        assert [line for line in lines if line.startswith(f"{path} was made from another recipe")], path
    assert kept(copied) == kept(finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")


def test_files_of_another_run_are_noticed(finished_run, copied, tmp_path, caplog):
    make(tmp_path / "other", finished_run / "teachers", "synthesis.lr=0.5")
    shutil.rmtree(copied / "work")
    shutil.copytree(tmp_path / "other" / "work", copied / "work")
    lines = again(copied, finished_run, caplog)
    named = {file for file in FILES if any(line.startswith(str(copied / "work" / file)) for line in lines)}
    assert named == {file for file in FILES if not file.startswith(RANDOM_REAL)}, "the control of both is the same"
    assert kept(copied) == kept(finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")


# -- what depends on what -------------------------------------------------------------------------------------------------


def remade(folder, finished_run, *overrides, teachers=None):
    """Files of DIR/work that a run with other settings writes again."""
    before = mtimes(folder / "work")
    make(folder, teachers or finished_run / "teachers", *overrides)
    after = mtimes(folder / "work")
    return {file for file in FILES if after[str(folder / "work" / file)] != before[str(folder / "work" / file)]}


def of(*kinds, sets=SETS):
    return {file for file in FILES if file.startswith(sets) and any(kind in file for kind in kinds)}


def test_nothing_is_made_again_without_a_change(finished_run, copied):
    before = mtimes(copied / "dataset") | mtimes(copied / "control")
    assert remade(copied, finished_run) == set()
    assert mtimes(copied / "dataset") | mtimes(copied / "control") == before


def test_image_files_that_decode_to_the_same_pixels_keep_their_labels(finished_run, copied):
    assert remade(copied, finished_run, "packaging.shard_megabytes=1") == of("encoded", "pixels", "rows")


def test_lossy_image_files_make_the_labels_again(finished_run, copied):
    assert remade(copied, finished_run, "packaging.image_format=jpeg") == of("")


@pytest.mark.parametrize("override", ["relabel.batch_size=5", "relabel.ensemble=mean", "relabel.view.mix=none"])
def test_other_labels_make_no_image_again(finished_run, copied, override):
    assert remade(copied, finished_run, override) == of("teacher_logits", "epoch")


def other_weights(finished_run, folder, name):
    """The teachers of a run, one of them with other weights, as if it had been trained elsewhere."""
    root = Path(shutil.copytree(finished_run / "teachers", folder))
    teacher = teacher_folder(name, tiny(), root)
    weights = load_file(teacher / "model.safetensors")
    first = next(key for key, value in weights.items() if value.is_floating_point() and value.ndim > 1)
    weights[first] = weights[first] * 1.01
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((teacher / "squeeze.json").read_text())
    write_json(teacher / "squeeze.json", facts | {"weights_sha256": digest_of_tensors(weights)})
    return root


@pytest.mark.parametrize("name", ["test_efficientnet", "test_byobnet"])
def test_other_weights_make_exactly_what_they_taught_again(finished_run, copied, tmp_path, name):
    """The first only aligns; the second labels too."""
    root = other_weights(finished_run, tmp_path / "teachers", f"squeeze:{name}")
    taught = {file for file in FILES if file.startswith(("jobs", DISTILLED))}
    if name == "test_byobnet":
        taught |= of("teacher_logits", "epoch")
    # The rows of the table say which job made what: the same numbers again, but from other images.
    assert remade(copied, finished_run, teachers=root) == taught


# -- parts ----------------------------------------------------------------------------------------------------------------


def test_stored_images_are_read_in_any_cut(finished_run):
    work = stages(finished_run, finished_run / "teachers").work
    images = StoredImages(work, DISTILLED)
    assert len(images) == 20
    whole = images.read(0, 20)
    assert images.encoded_bytes == whole.encoded_bytes == (finished_run / "work/distilled/encoded.bin").stat().st_size
    for start, stop in ((0, 1), (3, 9), (19, 20)):
        part = images.read(start, stop)
        assert part.encoded == whole.encoded[start:stop]
        assert torch.equal(part.labels, whole.labels[start:stop])
        assert torch.equal(part.slots, whole.slots[start:stop])
        assert torch.equal(part.jobs, whole.jobs[start:stop])
        assert torch.equal(part.teacher_logits, whole.teacher_logits[start:stop])
    assert list(work.places(DISTILLED)) == [(c, s) for c in range(10) for s in range(2)]


def test_a_seal_that_cannot_be_read_is_named(finished_run, copied):
    work = stages(copied, finished_run / "teachers").work
    seal_of(copied / "work/distilled/pixels.npy").write_text("garbage")
    with pytest.raises(DamagedError, match="pixels"):
        work.labels_key(DISTILLED)


def test_no_job_has_failed_where_there_is_none(tmp_path):
    assert read_failed(tmp_path) == []


def test_a_job_that_was_finished_after_all_has_not_failed(finished_run, copied):
    """Killed between writing the images and removing the mark."""
    failed = copied / "work/jobs/job-00001.failed.safetensors"
    write_tensors(failed, {}, {"job": 1, "reason": "bad"})
    assert read_failed(copied / "work") == []
    seal = seal_of(copied / "work/jobs/job-00001.safetensors")
    data = seal.read_bytes()
    seal.unlink()
    assert read_failed(copied / "work") == [{"job": 1, "reason": "bad"}]
    seal.write_bytes(data)
    make(copied, finished_run / "teachers")
    assert not failed.exists(), "it would be listed for ever"


def test_each_job_and_precision_has_its_own_files(tmp_path):
    work = Work(tmp_path, tiny(), {"train": "0", "teachers": {}})
    jobs = plan_jobs(tiny())
    paths = [work.job_file(job) for job in jobs] + [work.failed_file(job) for job in jobs]
    paths += [work.checkpoint_file(job, precision) for job in jobs for precision in ("float32", "bf16")]
    assert len(set(paths)) == 8
