"""Complete tiny runs of methods other than plain PRISM: random real images, G-VBSM, teacher-chosen start images."""

import json
import shutil
import subprocess

import pytest
import torch
from pipeline import PYTHON, ROOT, launch, make, mtimes, quiet_env, sha_tree, tiny

from prism_hf.compare.methods import random_recipe
from prism_hf.dataset.reader import load_distilled
from prism_hf.recipe.yaml_file import dump_recipe
from prism_hf.runtime.tensors import open_rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LIGHT = ("evaluation.full_data_epochs=0", "evaluation.seeds=[0,1]")
GVBSM = (
    "synthesis.init=noise", "teachers.selection=cycle", "synthesis.batch_order=within_class", "synthesis.batch_size=4",
    "synthesis.bn_reduction=sum", "synthesis.momentum=0.4", "synthesis.conv={patch: 4, drop: 0.2}",
    "synthesis.densification={size: 8}",
)  # fmt: skip


def go(recipe, folder, teachers, *words):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    words = ("--output", folder / "run", "--teachers", teachers, "--threads", "1", *words)
    return launch(*words, recipe=folder / "recipe.yaml")


def test_random_real_images_become_a_dataset_like_any_other(finished_run, tmp_path):
    assert go(random_recipe(tiny(*LIGHT), 2), tmp_path / "a", finished_run / "teachers") == 0
    run = tmp_path / "a" / "run"
    assert not (run / "control").exists(), "random real images need no separate control"
    ours, control = load_distilled(run / "dataset"), load_distilled(finished_run / "control")
    assert torch.equal(ours.images_uint8, control.images_uint8)
    assert torch.equal(ours.labels, control.labels)
    tables = [sha_tree(folder / "views") for folder in (run / "dataset", finished_run / "control")]
    assert tables[0] == tables[1], "the views or their labels differ"
    evaluation = json.loads((run / "report.json").read_text())["evaluation"]
    assert [(row["images"], row["labels"]) for row in evaluation["rows"]] == [("distilled", "soft"), ("distilled", "hard")]
    assert evaluation["names"] == {"distilled": "random real"}
    assert evaluation["left_out"]["random real"] == "the dataset itself consists of random real images"
    card = (run / "dataset" / "README.md").read_text()
    assert "20 real images, chosen and not optimized" in card
    assert "Real training images, drawn at random; nothing is optimized." in card
    assert "| random real | 20 | soft |" in card
    assert "distilled images" not in card.split("---", 2)[2]
    assert json.loads((run / "dataset" / "provenance.json").read_text())["images"] == "random_real"
    words = ("--output", tmp_path / "scored", "--teachers", finished_run / "teachers", "--threads", "1")
    assert launch(run / "dataset", *words, name="evaluate", recipe=None) == 0
    scored = json.loads((tmp_path / "scored" / "report.json").read_text())["evaluation"]
    assert all(scored[key] == evaluation[key] for key in ("rows", "names", "in_words"))
    assert scored["left_out"]["random real"] == evaluation["left_out"]["random real"]


@pytest.mark.slow
def test_gvbsm_gives_the_same_bytes_with_one_or_two_processes(finished_run, tmp_path):
    one, two, teachers = tmp_path / "one", tmp_path / "two", finished_run / "teachers"
    for stage in ("synthesize", "relabel", "package"):
        assert go(tiny(*LIGHT, *GVBSM), one, teachers, "--stage", stage) == 0
    # Without the cached statistics, one of the two processes gathers those of the convolutions.
    shutil.copytree(teachers, two / "teachers", ignore=shutil.ignore_patterns("statistics"))
    words = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--main_process_port", "0", str(ROOT / "recipes" / "prism.py")]
    words += [str(one / "recipe.yaml"), "--output", str(two / "run"), "--teachers", str(two / "teachers")]
    done = subprocess.run(
        [PYTHON, "-m", "accelerate.commands.launch", *words, "--threads", "1", "--stage", "synthesize"],
        capture_output=True, text=True, env=quiet_env(), check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    ours, theirs = (sha_tree(folder / "run" / "work" / "jobs") for folder in (two, one))
    assert ours == theirs
    assert len(ours) == 10
    found = [
        {n: s for n, s in sha_tree(t / "statistics").items() if n.endswith("conv.safetensors")}
        for t in (two / "teachers", teachers)
    ]
    assert found[0]
    assert found[0].items() <= found[1].items()
    card = (one / "run" / "dataset" / "README.md").read_text()
    assert "2 teachers take turns" in card
    assert "the G-VBSM scheme" in card


START = {
    "real_kmeans": ("synthesis.init=real_kmeans", "synthesis.easiest=0.5"),
    "mosaic": ("synthesis.init=mosaic", "synthesis.mosaic={candidates: 8, crops: 2}"),
}


@pytest.mark.parametrize("init", START)
def test_start_images_chosen_by_a_teacher_are_reused_and_rebuilt_when_damaged(finished_run, tmp_path, init, caplog):
    words = (finished_run / "teachers", *START[init], "synthesis.iterations=0")
    make(tmp_path / "run", *words, wanted=("synthesize",))
    start, jobs = tmp_path / "run" / "work" / "start.npy", tmp_path / "run" / "work" / "jobs"
    whole, images = start.read_bytes(), sha_tree(jobs)
    assert open_rows(start).shape == (20, 1, 16, 16)
    before = mtimes(start.parent)[start.as_posix()]
    for path in jobs.glob("job-00001*"):
        path.unlink()
    make(tmp_path / "run", *words, wanted=("synthesize",))
    assert mtimes(start.parent)[start.as_posix()] == before, "the start images were not reused"
    assert sha_tree(jobs) == images
    start.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for path in jobs.glob("job-00001*"):
        path.unlink()
    make(tmp_path / "run", *words, wanted=("synthesize",))
    assert start.read_bytes() == whole
    assert sha_tree(jobs) == images
    assert "start.npy.aside-1" in caplog.text
