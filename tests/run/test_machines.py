"""Several machines: with separate folders that are merged, or with a shared one, where one machine may vanish."""

import os
import shutil
import signal
import socket
import subprocess
import time

import psutil
import pytest
import torch
from each import each
from pipeline import PYTHON, RECIPE, ROOT, TINY, launch, quiet_env, sha_tree

from prism_hf.run.status import survey
from prism_hf.runtime.store import seal_of
from prism_hf.runtime.tensors import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FOUR = ("relabel.epochs=4", "packaging.shard_megabytes=1", "synthesis.ipc=3")


@pytest.fixture(scope="module", autouse=True)
def _an_epoch_a_shard():
    from prism_hf.dataset import format as cutting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_SHARD_VIEWS", 20)
        yield


@pytest.fixture(scope="module")
def teachers(finished_run):
    return finished_run / "teachers"


def go(folder, teachers, *words):
    return launch(*TINY, *FOUR, "--output", folder, "--teachers", teachers, "--threads", "1", *words)


@pytest.fixture(scope="module")
def whole(teachers, tmp_path_factory):
    """One run in one folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    for stage in ("synthesize", "relabel", "package"):
        assert go(folder, teachers, "--stage", stage) == 0
    return folder


@pytest.fixture(scope="module")
def parted(teachers, tmp_path_factory):
    """Two folders with a part of the images each, and then with a part of the labels each."""
    root = tmp_path_factory.mktemp("parted")
    a, b = root / "a", root / "b"
    for number, folder in enumerate((a, b), 1):
        assert go(folder, teachers, "--stage", "synthesize", "--part", f"{number}/2") == 0
    images = [sorted(path.name for path in (folder / "work" / "jobs").glob("*.safetensors")) for folder in (a, b)]
    only_images = root / "images of a"
    shutil.copytree(a, only_images)
    assert go(a, teachers, "--stage", "relabel", "--part", "1/2", "--merge", b) == 0
    assert go(b, teachers, "--stage", "relabel", "--part", "2/2", "--merge", only_images) == 0
    return a, b, images


def views(folder):
    return {path.name for path in (folder / "work" / "distilled" / "views").glob("*.parquet")}


def test_parts_have_every_job_and_every_shard_of_views_once(parted, whole):
    a, b, images = parted
    assert not set(images[0]) & set(images[1])
    assert sorted(images[0] + images[1]) == [f"job-{number:05d}.safetensors" for number in range(3)]
    assert not views(a) & views(b)
    assert views(a) | views(b) == views(whole)
    assert survey(a)["stages"]["synthesize"]["done"] == 3


def test_merged_parts_are_the_same_dataset(parted, whole, teachers, tmp_path):
    a, b, _ = parted
    c = tmp_path / "c"
    shutil.copytree(a, c)
    assert go(c, teachers, "--stage", "package", "--merge", b) == 0
    for name in ("dataset", "control"):
        assert sha_tree(c / name) == sha_tree(whole / name)
    before = sha_tree(c / "work")
    assert go(c, teachers, "--stage", "package", "--merge", b, a) == 0
    assert {k: v for k, v in sha_tree(c / "work").items() if "times" not in k} == {
        k: v for k, v in before.items() if "times" not in k
    }


def test_a_folder_without_the_others_is_not_packaged(parted, teachers, tmp_path, capsys):
    a, *_ = parted
    c = tmp_path / "c"
    shutil.copytree(a, c)
    assert go(c, teachers, "--stage", "package") == 2
    assert "not all images are labeled; run --stage relabel first" in capsys.readouterr().err


def forged(folder, kind):
    path = folder / "work" / "jobs" / "job-00001.safetensors"
    if kind == "damaged":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif kind == "of another run":
        other = folder / "work" / "jobs" / "job-00000.safetensors"
        shutil.copy2(other, path)
        shutil.copy2(seal_of(other), seal_of(path))


@each(
    "kind, message",
    [
        ("damaged", "was changed after it was written; merge folders of one recipe"),
        ("of another run", "was made from another recipe, or from other data, teachers or settings; merge folders of one"),
    ],
)
def test_a_file_of_another_run_is_refused(whole, teachers, tmp_path, capsys, kind, message):
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    forged(other, kind)
    mine = tmp_path / "mine"
    shutil.copytree(whole, mine)
    for path in (mine / "work" / "jobs").glob("job-00001*"):
        path.unlink()
    assert go(mine, teachers, "--stage", "package", "--merge", other) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(other) in error


def test_the_same_part_with_other_bytes_is_refused(whole, teachers, tmp_path, capsys):
    from prism_hf.runtime.store import Artifact, read_proof

    other = tmp_path / "other"
    shutil.copytree(whole, other)
    path = other / "work" / "jobs" / "job-00001.safetensors"
    proof = read_proof(path)
    Artifact(path, proof.key).write(lambda draft: draft.write_bytes(path.read_bytes() + b" "), proof.notes)
    assert go(whole, teachers, "--stage", "package", "--merge", other) == 2
    assert "are the same part of the run but differ" in capsys.readouterr().err


def test_labels_of_images_may_round_differently_on_other_hardware(whole, teachers, tmp_path):
    from prism_hf.runtime.store import Artifact, read_proof

    other = tmp_path / "other"
    shutil.copytree(whole, other)
    (path,) = (other / "work" / "distilled" / "data").glob("*.parquet")
    data = path.read_bytes()
    Artifact(path, read_proof(path).key).write(lambda draft: draft.write_bytes(data[:9] + b"x" + data[10:]))
    assert go(whole, teachers, "--stage", "package", "--merge", other) == 0


@each(
    "words, message",
    [
        (["--part", "3/2", "--stage", "synthesize"], "part 3/2 does not exist; expected 1/N to N/N"),
        (["--part", "1/2"], "add --stage synthesize, or --stage relabel with --merge"),
        (["--part", "1/2", "--stage", "evaluate"], "add --stage synthesize, or --stage relabel with --merge"),
        (["--merge", "nowhere"], "--merge 'nowhere' does not contain a run"),
    ],
)
def test_wrong_parts_are_refused_at_once(teachers, tmp_path, capsys, words, message):
    folder = tmp_path / "run"
    assert go(folder, teachers, *words) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_merging_another_recipe_names_the_keys(whole, finished_run, teachers, capsys):
    assert go(whole, teachers, "--stage", "package", "--merge", finished_run) == 2
    assert "belongs to another recipe; these keys differ: " in capsys.readouterr().err
    assert go(whole, teachers, "--stage", "package", "--merge", whole) == 2
    assert "is the output folder itself" in capsys.readouterr().err


# -- two launchers, one shared folder -----------------------------------------------------------------------------------


def machine(rank, port, folder, teachers, *words, silence="900"):
    """Start the launcher of one of two machines with a shared folder."""
    multi = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--mixed_precision", "no"]
    command = [PYTHON, "-m", "accelerate.commands.launch", *multi, *where, "--dynamo_backend", "no"]
    command += [str(ROOT / "recipes" / "prism.py"), str(RECIPE), *TINY, *words]
    command += ["--output", str(folder), "--teachers", str(teachers), "--threads", "1"]
    environment = quiet_env() | {"PRISM_HF_SILENCE_S": silence}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family(process):
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


@pytest.mark.slow
def test_two_machines_share_a_folder(finished_run, teachers, tmp_path):
    port, folder = free_port(), tmp_path / "run"
    both = [machine(rank, port, folder, teachers, "--stage", "synthesize") for rank in (0, 1)]
    errors = [process.communicate(timeout=400)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert "2 processes with 1 thread each" in errors[0]
    jobs = "work/jobs/job-0000{}.safetensors"
    for number in (0, 1):
        ours, theirs = (read_tensors(place / jobs.format(number)) for place in (folder, finished_run))
        assert torch.equal(ours["images_uint8"], theirs["images_uint8"])
    assert not list(folder.rglob("alive-*"))


@pytest.mark.slow
def test_a_machine_that_vanishes_does_not_hold_up_the_other_one(teachers, tmp_path):
    """All processes of one machine are frozen, so that its connections stay open, as after a loss of power."""
    port, folder = free_port(), tmp_path / "run"
    long = ("synthesis.iterations=100000", "--stage", "synthesize")
    both = [machine(rank, port, folder, teachers, *long, silence="8") for rank in (0, 1)]
    frozen = []
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("work/progress-*.json"))) < 2:
            assert time.monotonic() < deadline
            assert both[0].poll() is None
            time.sleep(0.2)
        time.sleep(3)
        frozen = family(both[1])
        for process in frozen:
            os.kill(process.pid, signal.SIGSTOP)
        error = both[0].communicate(timeout=60)[1]
        assert both[0].returncode
        assert "gave no sign of life for 8 seconds; this process ends too; finished work is kept" in error
    finally:
        for process in [*frozen, *(each for launched in both if launched.poll() is None for each in family(launched))]:
            if process.is_running():
                process.kill()
