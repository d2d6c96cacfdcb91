"""The stage relabel: both tables of every dataset, shard by shard; here with one epoch per shard."""

import dataclasses
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from each import product, rest_slow
from pipeline import make, mtimes, one_line, run_in, save_timm, sha_tree

from prism_hf.dataset import format as cutting
from prism_hf.dataset.reader import load_distilled
from prism_hf.errors import DataError, DeviceMemoryError, StageError, StoppedError, TeacherError
from prism_hf.images.pixels import decode, to_reference
from prism_hf.method.relabel import ask_teachers
from prism_hf.method.start_images import real_rows
from prism_hf.models.folding import folded
from prism_hf.recipe.plan import plan_jobs
from prism_hf.run.artifacts import job_file
from prism_hf.run.distill import run_stages
from prism_hf.run.evaluate import with_labels
from prism_hf.run.relabel import image_sets
from prism_hf.runtime import stop
from prism_hf.runtime.store import seal_of
from prism_hf.runtime.tensors import open_rows, read_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FOUR = "relabel.epochs=4"
SETS = ("distilled", "random_real")
CALLS = 2 * (2 + 4 * 2)
"""Questions to the teacher: two batches of images and two of each epoch, of two sets."""


@pytest.fixture(scope="module", autouse=True)
def _an_epoch_a_shard():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_SHARD_VIEWS", 20)
        yield


def begun(finished_run, folder, *overrides, **more):
    """Return a run whose jobs are finished."""
    run = run_in(folder, finished_run / "teachers", *overrides, **more)
    shutil.copytree(finished_run / "work" / "jobs", folder / "work" / "jobs", dirs_exist_ok=True)
    return run


@pytest.fixture(scope="module")
def labeled(finished_run, tmp_path_factory):
    """An undisturbed run up to its dataset."""
    folder = tmp_path_factory.mktemp("labeled") / "run"
    run_stages(begun(finished_run, folder, FOUR), ("synthesize", "relabel", "package"))
    return folder


def counted(run, at=None, act=None):
    """Count the forward passes of the teacher of a run, and call `act` at one of them."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == at:
            act()

    teacher = run.teachers(run.recipe.relabel.teachers)["squeeze:test_byobnet"]
    folded(teacher).model.register_forward_pre_hook(hook)
    return calls


def tables(folder):
    """Return the finished shards of DIR/work with their times."""
    files = mtimes(folder / "work")
    return {path: time for path, time in files.items() if path.endswith(".parquet") and f"{path}.seal" in files}


def kill():
    raise KeyboardInterrupt


def test_shards_are_written_in_both_folders_of_a_set(labeled):
    for name in SETS:
        shards = sorted(path.name for path in (labeled / "work" / name / "views").glob("*.parquet"))
        assert shards == [f"train-{number:05d}-of-00004.parquet" for number in range(4)]
        for number, shard in enumerate(shards):
            rows = pq.read_table(labeled / "work" / name / "views" / shard)
            assert rows["epoch"].to_pylist() == [number] * 20
            assert rows["batch"].to_pylist() == [0] * 10 + [1] * 10


def test_epochs_do_not_depend_on_the_sharding(finished_run, labeled, tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "_SHARD_VIEWS", 8192)
    folder = tmp_path / "run"
    run_stages(begun(finished_run, folder, FOUR), ("relabel", "package"))
    assert [path.name for path in (folder / "dataset" / "views").iterdir()] == ["train-00000-of-00001.parquet"]
    for part in ("dataset", "control"):
        assert pq.read_table(folder / part / "views").equals(pq.read_table(labeled / part / "views"))
        assert sha_tree(folder / part / "data") == sha_tree(labeled / part / "data")


# -- codecs -----------------------------------------------------------------------------------------------------------


def test_labels_that_are_not_stored_are_computed_again_bit_for_bit(finished_run, labeled, tmp_path):
    folder = tmp_path / "run"
    run = begun(finished_run, folder, FOUR, "relabel.codec=seed")
    asked = counted(run)
    run_stages(run, ("relabel", "package"))
    assert len(asked) == 2 * 2, "only the images themselves are labeled"
    stored = load_distilled(labeled / "dataset")
    bare = load_distilled(folder / "dataset")
    assert (bare.codec, bare.label_bytes < stored.label_bytes) == ("seed", True)
    again = with_labels(run, bare)
    for epoch in (0, 3, 1):
        ours, theirs = again.epoch(epoch), stored.epoch(epoch)
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[0].view.crop, theirs[0].view.crop)
    part = range(10, 20)
    assert torch.equal(again.views(2, part)[1], stored.views(2, part)[1])
    other = dataclasses.replace(bare, recipe=dataclasses.replace(bare.recipe, seed=5))
    with pytest.raises(DataError, match="views of epoch 0 are not those that its recipe"):
        with_labels(run, other).epoch(0)
    changed = dataclasses.replace(bare, teacher_weights={"squeeze:test_byobnet": "0" * 64})
    with pytest.raises(TeacherError, match="has other weights than provenance"):
        with_labels(run, changed)


def test_fewer_stored_epochs_are_the_first_ones(finished_run, labeled, tmp_path):
    folder = tmp_path / "run"
    run_stages(begun(finished_run, folder, FOUR, "relabel.stored_epochs=2"), ("relabel", "package"))
    ours = pq.read_table(folder / "dataset" / "views")
    assert ours.equals(pq.read_table(labeled / "dataset" / "views").slice(0, 40))
    card = (folder / "dataset" / "README.md").read_text(encoding="utf-8")
    assert "for 2 recorded augmented views of each image, which students use again for 4 epochs." in card


# -- killed, stopped, damaged -----------------------------------------------------------------------------------------


ENDS = product([1, 4, 5, 6, 12, CALLS], ["killed", "asked to stop"])


@pytest.mark.parametrize(
    ("at", "how"),
    rest_slow(ENDS, [(1, "killed"), (5, "asked to stop"), (6, "killed"), (CALLS, "asked to stop")]),
)
def test_a_run_that_ends_early_loses_at_most_one_shard(finished_run, labeled, tmp_path, at, how):
    folder = tmp_path / "run"
    run = begun(finished_run, folder, FOUR)
    asked = counted(run, at, kill if how == "killed" else stop._wanted.set)
    try:
        with pytest.raises((KeyboardInterrupt, StoppedError)):
            run_stages(run, ("relabel",))
    finally:
        stop._wanted.clear()
    assert not list(folder.rglob(".draft-*"))
    assert not list(folder.rglob("progress-*"))
    kept = tables(folder)
    assert (at - 1) // 2 <= len(kept) <= at // 2, "two forward passes per shard"
    again = begun(finished_run, folder, FOUR)
    more = counted(again)
    run_stages(again, ("relabel", "package"))
    assert len(more) == CALLS - 2 * len(kept), "finished shards are not recreated"
    assert len(asked) + len(more) <= CALLS + 2
    assert tables(folder).items() >= kept.items()
    for part in ("dataset", "control"):
        assert sha_tree(folder / part) == sha_tree(labeled / part)


def test_only_a_damaged_shard_is_recreated(finished_run, labeled, tmp_path, caplog):
    folder = tmp_path / "run"
    run = begun(finished_run, folder, FOUR)
    run_stages(run, ("relabel", "package"))
    shard = folder / "work" / "random_real" / "views" / "train-00002-of-00004.parquet"
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    before = {path: time for path, time in tables(folder).items() if path != str(shard)}
    again = begun(finished_run, folder, FOUR)
    asked = counted(again)
    with caplog.at_level("INFO", "prism_hf"):
        run_stages(again, ("relabel", "package"))
    assert len(asked) == 2
    assert "relabel: 2 of 2 image shards done, 0 to do" in caplog.messages
    assert "relabel: 7 of 8 view shards done, 1 to do" in caplog.messages
    assert tables(folder).items() >= before.items()
    assert sha_tree(folder / "control") == sha_tree(labeled / "control")


def test_a_second_launch_runs_no_teacher(finished_run, tmp_path):
    run_stages(begun(finished_run, tmp_path / "run"), ("relabel",))
    before = mtimes(tmp_path / "run" / "work")
    again = begun(finished_run, tmp_path / "run")
    asked = counted(again)
    run_stages(again, ("relabel",))
    assert asked == []
    after = mtimes(tmp_path / "run" / "work")
    assert {path for path in before if before[path] != after[path] and "/jobs/" not in path} == {
        str(tmp_path / "run" / "work" / "times.json")
    }


# -- the labeled images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_the_teachers_label_the_packaged_bytes(finished_run, tmp_path, image_format):
    """In a lossy format, the decoded pixels differ from the optimized ones."""
    folder = tmp_path / "run"
    run = begun(finished_run, folder, f"packaging.image_format={image_format}", "packaging.jpeg_quality=30")
    run_stages(run, ("relabel", "package"))
    table = pq.read_table(folder / "dataset" / "data")
    shipped = torch.stack([decode(cell["bytes"], 1) for cell in table["image"].to_pylist()])
    jobs = [read_tensors(job_file(run.work, job))["images_uint8"] for job in range(2)]
    optimized = torch.stack(jobs, dim=1).flatten(0, 1)
    assert torch.equal(shipped, optimized) == (image_format == "png")
    assert torch.equal(open_rows(folder / "work" / "distilled" / "pixels.npy"), shipped)
    teachers = [folded(teacher) for teacher in run.teachers(run.recipe.relabel.teachers).values()]
    labels = [ask_teachers(to_reference(batch), teachers, run.recipe.relabel) for batch in shipped.split(10)]
    stored = np.stack(table["teacher_logits"].to_numpy(zero_copy_only=False))
    assert np.array_equal(stored, torch.cat(labels).numpy())


def test_datasets_record_the_origin_of_each_image(finished_run, tmp_path):
    run = begun(finished_run, tmp_path / "run")
    distilled, control = image_sets(run)
    jobs = plan_jobs(run.recipe)
    assert [origin[:2] for origin in distilled.origins] == [(c, s) for c in range(10) for s in range(2)], "class-major"
    for label, slot, job, row in distilled.origins:
        assert (jobs[job].classes[row], jobs[job].slots[row]) == (label, slot)
    chosen = real_rows(run.data, 2, seed=0)
    assert control.origins == tuple((c, s, -1, int(chosen[2 * c + s])) for c in range(10) for s in range(2))
    assert (len(distilled), len(control)) == (20, 20)


def test_images_in_several_shards_equal_those_in_one(finished_run, tmp_path):
    """Large images from two batches: the shards are split between the batches, and no label changes."""
    teacher = save_timm(tmp_path / "teacher", classes=10, names="0123456789")
    words = (
        "data.size=256", "synthesis.iterations=0", f"teachers.logit=local-dir:{teacher}", "teachers.bn_pool=[]",
        f"relabel.teachers=['local-dir:{teacher}']", "relabel.epochs=1",
    )  # fmt: skip
    whole = make(tmp_path / "whole", finished_run / "teachers", *words, with_control=False)
    cut = make(tmp_path / "cut", finished_run / "teachers", *words, "packaging.shard_megabytes=1", with_control=False)
    one, two = (sorted((run.dataset / "data").iterdir()) for run in (whole, cut))
    assert (len(one), [path.name for path in two]) == (1, [f"train-{n:05d}-of-00002.parquet" for n in (0, 1)])
    assert [len(pq.read_table(path)) for path in two] == [10, 10]
    assert pq.read_table(one[0]).equals(pa.concat_tables(pq.read_table(path) for path in two))
    assert sha_tree(whole.dataset / "views") == sha_tree(cut.dataset / "views")


# -- requirements -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", [[0], [0, 1]])
def test_the_error_names_unfinished_jobs_and_the_stage_that_makes_them(finished_run, tmp_path, left_out):
    run = begun(finished_run, tmp_path / "run")
    for job in left_out:
        seal_of(job_file(run.work, job)).unlink()
    with pytest.raises(StageError) as error:
        run_stages(run, ("relabel",))
    assert f"{len(left_out)} of 2 synthesis jobs are not finished" in one_line(error)
    assert "--stage synthesize" in one_line(error)


def test_the_out_of_memory_error_names_batch_and_teachers(finished_run, tmp_path):
    run = begun(finished_run, tmp_path / "run")

    def full():
        raise torch.OutOfMemoryError("no room")

    for at in (1, 5):  # of images, of views
        counted(run, at, full)
        with pytest.raises(DeviceMemoryError) as error:
            run_stages(run, ("relabel",))
        assert "a batch of 10 images and teachers squeeze:test_byobnet" in one_line(error)
        assert "relabel.batch_size" in one_line(error)


def test_views_of_a_grid_stay_in_its_cells_and_those_of_real_images_do_not(finished_run, tmp_path):
    words = (
        "synthesis.init=mosaic", "synthesis.mosaic={crops: 1, crop_scale: [1, 1], easiest: 0.5}", "relabel.view.cell=2",
        "synthesis.iterations=0", "relabel.epochs=3",
    )  # fmt: skip
    run = make(tmp_path / "grid", finished_run / "teachers", *words)
    side, crossing = run.recipe.data.size // 2, {}
    for name, folder in (("grid", run.dataset), ("real", run.control)):
        tables = [pq.read_table(path) for path in sorted((folder / "views").iterdir())]
        crops = np.stack(pa.concat_tables(tables)["crop"].to_numpy(zero_copy_only=False))
        assert len(crops) == 60
        crossing[name] = int(((crops[:, :2] // side) != ((crops[:, :2] + crops[:, 2:] - 1) // side)).any(1).sum())
    assert crossing["grid"] == 0
    assert crossing["real"] > 40
