import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from pipeline import RECIPE, TINY, launch, make, sha_tree, stages

from prism_hf.dataset.reader import load_distilled
from prism_hf.errors import StageError, SynthesisError
from prism_hf.recipe.plan import plan_jobs
from prism_hf.run.artifacts import read_failed
from prism_hf.runtime.stop import stop_wanted
from prism_hf.runtime.store import check_sealed
from prism_hf.runtime.tensors import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# Two steps throw the pixels of slot 0 out of float32; slot 1 makes only the first of them.
BAD = ("synthesis.iterations=2", "synthesis.ladder={step: 1, period: 2}", "synthesis.lr=1.0e+38", "synthesis.clamp=false")
LIGHT = ("evaluation.full_data_epochs=0", "evaluation.seeds=[0]")


def go(folder, finished_run, *words):
    words = [*TINY, *LIGHT, *words, "--output", folder, "--threads", "1"]
    return launch(*words, "--teachers", finished_run / "teachers", recipe=RECIPE)


@pytest.fixture(scope="module")
def failed(finished_run, tmp_path_factory):
    """A run whose job 0 goes bad."""
    folder = tmp_path_factory.mktemp("failed") / "run"
    assert go(folder, finished_run, *BAD) == 2
    return folder


def test_a_job_that_goes_bad_is_marked_and_the_others_are_finished(failed):
    files = {path.name for path in (failed / "work" / "jobs").glob("*.safetensors")}
    assert files == {"job-00000.failed.safetensors", "job-00001.safetensors"}
    (note,) = read_failed(failed / "work")
    assert (note["job"], note["precision"]) == (0, "float32")
    assert "job 0, iteration 2: not finite" in note["reason"]
    path = failed / "work" / "jobs" / "job-00000.failed.safetensors"
    check_sealed(path)
    state = read_tensors(path)
    assert {"pixels", "generator", "losses", "adam/exp_avg"} <= set(state)
    assert state["pixels"].shape == (10, 1, 16, 16)
    assert not (failed / "dataset").exists()
    assert "failed" in (failed / "logs" / "run.log").read_text()


def test_the_error_names_the_job_and_what_to_do(failed, finished_run, tmp_path, capsys):
    shutil.copytree(failed, tmp_path / "run")
    assert go(tmp_path / "run", finished_run, *BAD) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("SynthesisError")]
    assert "1 job(s) failed: 0" in line
    assert "--allow-partial" in line
    log = (tmp_path / "run" / "logs" / "run.log").read_text()
    assert log.count("the job is marked as failed") == 2, "it was tried again"


def test_the_rest_is_packaged_when_that_is_asked_for(failed, finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(failed, folder)
    assert go(folder, finished_run, *BAD, "--allow-partial") == 0
    for name, jobs in (("dataset", [1] * 10), ("control", [-1] * 10)):
        provenance = json.loads((folder / name / "provenance.json").read_text())
        assert provenance["partial"] == {"images": 10, "of": 20, "failed_jobs": [0]}
        table = pq.read_table(folder / name / "data")
        assert table["label"].to_pylist() == list(range(10))
        assert table["slot"].to_pylist() == [1] * 10
        assert table["job"].to_pylist() == jobs
        views = pq.read_table(folder / name / "views")
        assert views.num_rows == 20
        assert max(views["image_index"].to_pylist()) == 9
    distilled, control = (load_distilled(folder / name) for name in ("dataset", "control"))
    kept = read_tensors(folder / "work" / "jobs" / "job-00001.safetensors")["images_uint8"]
    assert torch.equal(distilled.images_uint8, kept)
    assert torch.equal(distilled.labels, control.labels)
    report = json.loads((folder / "report.json").read_text())
    assert report["failed_jobs"] == [0]
    assert {row["count"] for row in report["evaluation"]["rows"]} == {10}


def test_a_partial_set_needs_at_least_one_job(finished_run, tmp_path):
    words = ("synthesis.iterations=3", "synthesis.lr=1.0e+38", "synthesis.clamp=false")
    with pytest.raises(StageError, match="2 of 2 synthesis jobs are not finished"):
        make(tmp_path / "run", finished_run / "teachers", *words, allow_partial=True)
    assert len(read_failed(tmp_path / "run" / "work")) == 2


def test_a_complete_set_has_no_word_about_missing_images(finished_run):
    assert "partial" not in json.loads((finished_run / "dataset" / "provenance.json").read_text())


# -- once more ---------------------------------------------------------------------------------------------------------


def broken(made, spoil):
    """The logit teacher of a run with a hook on its answers."""
    teacher = made.teachers(made.recipe.teachers.synthesis_names)[made.recipe.teachers.logit]
    return teacher.model.register_forward_hook(lambda _module, _inputs, output: spoil(output))


def test_a_failed_job_is_tried_again_at_the_next_launch(finished_run, tmp_path):
    made, calls = stages(tmp_path / "run", finished_run / "teachers"), []

    def once(output):
        calls.append(1)
        return output * float("nan") if len(calls) == 2 else output

    broken(made, once)
    with pytest.raises(SynthesisError, match="1 job"):
        made(("synthesize",))
    assert [note["job"] for note in read_failed(tmp_path / "run" / "work")] == [plan_jobs(made.recipe)[0].id]
    make(tmp_path / "run", finished_run / "teachers")
    assert read_failed(tmp_path / "run" / "work") == []
    assert sha_tree(tmp_path / "run" / "work" / "jobs") == sha_tree(finished_run / "work" / "jobs")
    assert sha_tree(tmp_path / "run" / "dataset") == sha_tree(finished_run / "dataset")


def test_a_job_that_goes_bad_in_bf16_is_made_in_float32(finished_run, tmp_path, monkeypatch, caplog):
    """The teacher answers beyond every range under autocast only."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    made = stages(tmp_path / "run", finished_run / "teachers")
    assert made.run.precision == "bf16"
    broken(made, lambda output: output * float("inf") if torch.is_autocast_enabled("cpu") else output)
    made(("synthesize",))
    assert read_failed(tmp_path / "run" / "work") == []
    for job in plan_jobs(made.recipe):
        assert made.work.job_notes(job)["precision"] == "float32"
        path = f"work/jobs/job-{job.id:05d}.safetensors"
        ours, theirs = (read_tensors(folder / path)["images_uint8"] for folder in (tmp_path / "run", finished_run))
        assert torch.equal(ours, theirs)
    assert {path.name for path in (tmp_path / "run/work/jobs").glob("*checkpoint*")} == set()
    assert caplog.text.count("once more in float32") == 2


def test_bf16_is_used_where_it_is_asked_for(finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    made = stages(tmp_path / "run", finished_run / "teachers")
    seen = set()

    def look(output):
        seen.add(torch.is_autocast_enabled("cpu"))
        return output

    broken(made, look)
    made(("synthesize",))
    assert seen == {True, False}, "the final score is not under autocast"
    assert {made.work.job_notes(job)["precision"] for job in plan_jobs(made.recipe)} == {"bf16"}


def test_a_killed_job_goes_on_from_its_checkpoint(finished_run, tmp_path, caplog):
    made, calls = stages(tmp_path / "run", finished_run / "teachers", checkpoint_s=0.0), []

    def kill(output):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return output

    broken(made, kill)
    with pytest.raises(KeyboardInterrupt):
        made(("synthesize",))
    assert not stop_wanted()
    (kept,) = (tmp_path / "run/work/jobs").glob("*.checkpoint.safetensors")
    assert check_sealed(kept)["notes"]["state"]["step"] == 2
    with caplog.at_level("INFO", "prism_hf"):
        make(tmp_path / "run", finished_run / "teachers")
    assert "0 of 2 jobs found, 1 go on from a checkpoint, 1 to start" in caplog.text
    assert sha_tree(tmp_path / "run" / "work" / "jobs") == sha_tree(finished_run / "work" / "jobs")
