"""Files that the stages exchange in DIR/work: damaged or foreign files are recreated, and nothing else is."""

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline import copy_run, make, mtimes, run_in, sha_tree, tiny
from safetensors.torch import load_file, save_file

from prism_hf.dataset.format import DISTILLED, IMAGES, RANDOM_REAL, VIEWS, Shard
from prism_hf.models.squeeze import teacher_folder
from prism_hf.models.teacher import digest_of_tensors
from prism_hf.recipe.plan import plan_jobs
from prism_hf.run.artifacts import Artifacts, ImageSet, read_failed
from prism_hf.runtime.store import SEAL, Artifact, digest, read_proof, seal_of, sha256_of, write_json
from prism_hf.runtime.tensors import write_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETS = (DISTILLED, RANDOM_REAL)
TABLE = "train-00000-of-00001.parquet"
SHARED = (f"{IMAGES}/{TABLE}", f"{VIEWS}/{TABLE}", "pixels.npy")
FILES = [f"jobs/job-{job:05d}.safetensors" for job in range(2)] + [f"{name}/{file}" for name in SETS for file in SHARED]


@pytest.fixture
def copied(finished_run, tmp_path):
    return copy_run(finished_run, tmp_path / "copy")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def kept(folder):
    """Return the SHA-256 of the files that stages exchange, without the notes of times and files set aside."""
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
def test_a_damaged_file_of_any_kind_is_named_set_aside_and_recreated(finished_run, copied, caplog, kind):
    for file in FILES:
        DAMAGE[kind](copied / "work" / file)
    lines = again(copied, finished_run, caplog)
    for file in FILES:
        named = [line for line in lines if line.startswith(str(copied / "work" / file))]
        assert len(named) == 1, file
        assert f"set aside as {Path(file).name}.aside-1, to be recreated" in named[0]
        assert (copied / "work" / f"{file}.aside-1").exists() == (kind != "removed")
        assert (copied / "work" / f"{file}.aside-1{SEAL}").exists()
    assert kept(copied) == kept(finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")
    assert sha_tree(copied / "control") == sha_tree(finished_run / "control")


@pytest.mark.parametrize("file", ["jobs/job-00001.safetensors", f"distilled/data/{TABLE}", f"random_real/views/{TABLE}"])
def test_a_file_without_its_seal_is_silently_recreated(finished_run, copied, caplog, file):
    seal_of(copied / "work" / file).unlink()
    assert again(copied, finished_run, caplog) == []
    assert kept(copied) == kept(finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")


SWAPS = {
    "jobs": ("jobs/job-00000.safetensors", "jobs/job-00001.safetensors"),
    "images of the sets": (f"distilled/data/{TABLE}", f"random_real/data/{TABLE}"),
    "views of the sets": (f"distilled/views/{TABLE}", f"random_real/views/{TABLE}"),
    "images and views": (f"distilled/data/{TABLE}", f"distilled/views/{TABLE}"),
    "pixels of the sets": ("distilled/pixels.npy", "random_real/pixels.npy"),
}


@pytest.mark.parametrize("kind", list(SWAPS))
def test_swapped_files_are_detected_even_with_their_seals(finished_run, copied, caplog, kind):
    one, two = (copied / "work" / file for file in SWAPS[kind])
    for path, from_ in ((one, SWAPS[kind][1]), (two, SWAPS[kind][0])):
        path.unlink()
        shutil.copyfile(finished_run / "work" / from_, path)
        shutil.copyfile(seal_of(finished_run / "work" / from_), seal_of(path))
        if kind == "pixels of the sets":  # only the labeling of views needs them
            seal_of(path.with_name(VIEWS) / TABLE).unlink()
    lines = again(copied, finished_run, caplog)
    for path in (one, two):
        assert [line for line in lines if line.startswith(f"{path} was made from another recipe")], path
    assert kept(copied) == kept(finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")


def test_files_of_another_run_are_detected(finished_run, copied, tmp_path, caplog):
    make(tmp_path / "other", finished_run / "teachers", "synthesis.lr=0.5")
    shutil.rmtree(copied / "work")
    shutil.copytree(tmp_path / "other" / "work", copied / "work")
    lines = again(copied, finished_run, caplog)
    named = {file for file in FILES if any(line.startswith(str(copied / "work" / file)) for line in lines)}
    assert named == {file for file in FILES if not file.startswith(RANDOM_REAL)}, "both runs have the same control"
    assert kept(copied) == kept(finished_run)
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")


# -- dependencies ---------------------------------------------------------------------------------------------------------


def remade(folder, finished_run, *overrides, teachers=None):
    """Return the files of DIR/work that a run with other settings rewrites."""
    before = mtimes(folder / "work")
    make(folder, teachers or finished_run / "teachers", *overrides)
    after = mtimes(folder / "work")
    return {file for file in FILES if after[str(folder / "work" / file)] != before[str(folder / "work" / file)]}


def of(*kinds, sets=SETS):
    return {file for file in FILES if file.startswith(sets) and any(kind in file for kind in kinds)}


def test_nothing_is_recreated_without_a_change(finished_run, copied):
    before = mtimes(copied / "dataset") | mtimes(copied / "control")
    assert remade(copied, finished_run) == set()
    assert mtimes(copied / "dataset") | mtimes(copied / "control") == before


def test_tables_with_the_same_shard_bounds_are_kept(finished_run, copied):
    assert remade(copied, finished_run, "packaging.shard_megabytes=1") == set()


def test_lossy_image_files_recreate_the_labels(finished_run, copied):
    assert remade(copied, finished_run, "packaging.image_format=jpeg") == of("")


@pytest.mark.parametrize("override", ["relabel.batch_size=5", "relabel.ensemble=mean", "relabel.view.mix=none"])
def test_other_label_settings_recreate_both_tables_and_no_image(finished_run, copied, override):
    assert remade(copied, finished_run, override) == of(IMAGES, VIEWS)


def other_weights(finished_run, folder, name):
    """Copy the teachers of a run, one of them with other weights, as if it had been trained elsewhere."""
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
def test_other_weights_recreate_exactly_what_depends_on_them(finished_run, copied, tmp_path, name):
    """The first teacher is only used for alignment; the second also labels."""
    root = other_weights(finished_run, tmp_path / "teachers", f"squeeze:{name}")
    taught = {file for file in FILES if file.startswith(("jobs", DISTILLED))}
    if name == "test_byobnet":
        taught |= of(IMAGES, VIEWS)
    assert remade(copied, finished_run, teachers=root) == taught


# -- keys -----------------------------------------------------------------------------------------------------------------


def artifacts(folder=Path("work"), *overrides, **changes):
    recipe = tiny(*overrides)
    weights = dict.fromkeys(recipe.all_teachers, "0")
    return replace(Artifacts(folder, recipe, "content", tuple("0123456789"), weights), **changes)


def keys(files):
    """Return the key of each kind of file."""
    job, images = plan_jobs(tiny())[0], ImageSet(DISTILLED, ((0, 0, 0, 0),), "key of the images")
    shard = Shard("train-0.parquet", range(1))
    return {
        "start": files.start.key, "job": files.job(job).key, "control": files.images_key([1, 2]),
        "images": files.shard(images, IMAGES, shard).key, "views": files.shard(images, VIEWS, shard).key,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ("name=other", ()), ("evaluation.lr=0.5", ()), ("packaging.shard_megabytes=1", ()),
        ("synthesis.lr=0.5", ("job",)), ("synthesis.ipc=3", ("start", "job")), ("relabel.epochs=9", ("images", "views")),
        ("packaging.image_format=jpeg", ("control",)), ("packaging.jpeg_quality=50", ("control",)),
        ("seed=1", ("start", "job", "control", "images", "views")),
        ({"train_content": "other"}, ("start", "job", "control", "images", "views")),
        ({"class_names": tuple("abcdefghij")}, ("images",)),
        ({"weights": {"squeeze:test_byobnet": "0", "squeeze:test_efficientnet": "1"}}, ("job",)),
        ({"weights": {"squeeze:test_byobnet": "1", "squeeze:test_efficientnet": "0"}}, ("start", "job", "images", "views")),
    ],
    ids=str,
)  # fmt: skip
def test_a_key_depends_exactly_on_the_inputs_of_its_file(change, kinds):
    plain = keys(artifacts())
    other = keys(artifacts(Path("work"), change) if isinstance(change, str) else artifacts(**change))
    assert {kind for kind in plain if plain[kind] != other[kind]} == set(kinds)


def test_the_key_of_a_shard_depends_on_its_rows():
    """Another version of this package may choose other shard bounds and so store other rows under the same name."""
    files, images = artifacts(), ImageSet(DISTILLED, ((0, 0, 0, 0),), "key")
    for table in (IMAGES, VIEWS):
        one, two = (files.shard(images, table, Shard("train-0.parquet", range(end))) for end in (3, 4))
        assert one.path == two.path
        assert one.key != two.key
        assert files.shard(replace(images, key="other"), table, Shard("train-0.parquet", range(3))).key != one.key
    one, two = (files.shard(images, table, Shard("train-0.parquet", range(1))) for table in (IMAGES, VIEWS))
    assert one.key != two.key


def test_each_job_and_precision_has_its_own_files(tmp_path):
    files, jobs = artifacts(tmp_path), plan_jobs(tiny())
    made = [files.job(job) for job in jobs] + [files.failed(job) for job in jobs]
    made += [files.checkpoint(job, precision) for job in jobs for precision in ("float32", "bf16")]
    assert len({file.path for file in made}) == 8
    assert len({file.key for file in made}) == 6, "a failed job has the same inputs as a finished one"


def test_keys_and_proofs_of_many_jobs_take_little_time(tmp_path):
    files, job, shard = artifacts(tmp_path), plan_jobs(tiny())[0], Shard("train-0.parquet", range(3))
    images = ImageSet(DISTILLED, ((0, 0, 0, 0),), "key of the images")
    files.job(job).write_bytes(b"images")
    started = time.process_time()
    for _ in range(1000):
        assert files.job(job).is_whole()
        files.shard(images, VIEWS, shard)
    assert time.process_time() - started < 1.5, "with a fingerprint for each key, 5 s"


def test_jobs_finished_by_an_earlier_version_are_kept(finished_run, copied):
    """The test writes the file as that version did, with the key among the notes."""
    run = run_in(copied, finished_run / "teachers")
    recipe, weights = run.recipe, run.artifacts.weights
    facts = recipe.fingerprint("method", "data", "teachers", "squeeze", "synthesis")
    taught = {name: weights[name] for name in recipe.teachers.synthesis_names}
    key = digest(["synthesis", facts, run.data.train.content, taught])[:16]
    for job in plan_jobs(recipe):
        path = copied / "work" / "jobs" / f"job-{job.id:05d}.safetensors"
        notes = {"key": f"{key}/{job.id}", **read_proof(path).notes}
        assert list(notes)[:2] == ["key", "job"]
        value = {"file_sha256": sha256_of(path), "bytes": path.stat().st_size, "notes": notes}
        write_json(seal_of(path), value | {"sha256": digest(value)})
    for name in SETS:
        shutil.rmtree(copied / "work" / name)
    for file in ("encoded.bin", "epoch-00000.parquet"):
        Artifact(copied / "work" / DISTILLED / file, "of an earlier version").write_bytes(b"x")
    (copied / "work" / "students").mkdir()
    (copied / "work" / "students" / "distilled-soft-seed0.json").write_text('{"top1": 0.5, "key": "k", "sha256": "0"}')
    before = mtimes(copied / "work" / "jobs")
    make(copied, finished_run / "teachers")
    assert mtimes(copied / "work" / "jobs") == before
    assert sha_tree(copied / "dataset") == sha_tree(finished_run / "dataset")


# -- jobs that failed -----------------------------------------------------------------------------------------------------


def test_without_jobs_none_has_failed(tmp_path):
    assert read_failed(tmp_path) == []


def test_a_job_that_finished_later_does_not_count_as_failed(finished_run, copied):
    """The process was killed between writing the images and removing the mark."""
    failed = copied / "work/jobs/job-00001.failed.safetensors"
    write_tensors(Artifact(failed, "k"), {}, {"job": 1, "reason": "bad"})
    assert read_failed(copied / "work") == []
    seal = seal_of(copied / "work/jobs/job-00001.safetensors")
    data = seal.read_bytes()
    seal.unlink()
    assert read_failed(copied / "work") == [{"job": 1, "reason": "bad"}]
    seal.write_bytes(data)
    make(copied, finished_run / "teachers")
    assert not failed.exists(), "otherwise the job would always be listed as failed"
