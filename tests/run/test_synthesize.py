"""The stage synthesize: jobs that resume, diverge, and are retried."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from each import product, rest_slow
from pipeline import RECIPE, TINY, launch, make, mtimes, run_in, sha_tree, tiny

from prism_hf.dataset.reader import load_distilled
from prism_hf.errors import StageError, StoppedError, SynthesisError
from prism_hf.recipe.plan import plan_jobs
from prism_hf.run.artifacts import job_file, read_failed
from prism_hf.run.context import Loaded
from prism_hf.run.distill import run_stages
from prism_hf.runtime import stop
from prism_hf.runtime.store import read_proof, sha256_of
from prism_hf.runtime.tensors import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# After two steps, the pixels of slot 0 overflow float32; slot 1 takes only the first of these steps.
BAD = ("synthesis.iterations=2", "synthesis.ladder={step: 1, period: 2}", "synthesis.lr=1.0e+38", "synthesis.clamp=false")
LIGHT = ("evaluation.full_data_epochs=0", "evaluation.seeds=[0]")


def go(folder, finished_run, *words):
    words = [*TINY, *LIGHT, *words, "--output", folder, "--threads", "1"]
    return launch(*words, "--teachers", finished_run / "teachers", recipe=RECIPE)


@pytest.fixture(scope="module")
def failed(finished_run, tmp_path_factory):
    """A run whose job 0 diverges."""
    folder = tmp_path_factory.mktemp("failed") / "run"
    assert go(folder, finished_run, *BAD) == 2
    return folder


def test_a_diverging_job_is_marked_and_the_others_finish(failed):
    files = {path.name for path in (failed / "work" / "jobs").glob("*.safetensors")}
    assert files == {"job-00000.failed.safetensors", "job-00001.safetensors"}
    (note,) = read_failed(failed / "work")
    assert (note["job"], note["precision"]) == (0, "float32")
    assert "job 0, iteration 2: not finite" in note["reason"]
    path = failed / "work" / "jobs" / "job-00000.failed.safetensors"
    assert read_proof(path).sha256 == sha256_of(path)
    state = read_tensors(path)
    assert {"pixels", "generator", "losses", "adam/exp_avg"} <= set(state)
    assert state["pixels"].shape == (10, 1, 16, 16)
    assert not state["pixels"].isfinite().all()
    assert not (failed / "dataset").exists()
    assert "failed" in (failed / "logs" / "run.log").read_text()


def test_the_error_names_the_job_and_what_to_do(failed, finished_run, tmp_path, capsys):
    shutil.copytree(failed, tmp_path / "run")
    assert go(tmp_path / "run", finished_run, *BAD) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("SynthesisError")]
    assert "1 job failed: 0" in line
    assert "--allow-partial" in line
    log = (tmp_path / "run" / "logs" / "run.log").read_text()
    assert log.count("the job is marked as failed") == 2, "the job was retried"


def test_the_other_jobs_are_packaged_on_request(failed, finished_run, tmp_path):
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


def test_a_complete_dataset_does_not_mention_missing_images(finished_run):
    assert "partial" not in json.loads((finished_run / "dataset" / "provenance.json").read_text())


# -- retries -----------------------------------------------------------------------------------------------------------


def broken(run, spoil):
    """Put a hook on the outputs of the logit teacher of a run."""
    teacher = run.teachers(run.recipe.teachers.synthesis_names)[run.recipe.teachers.logit]
    return teacher.model.register_forward_hook(lambda _module, _inputs, output: spoil(output))


def test_the_next_launch_retries_a_failed_job(finished_run, tmp_path):
    run, calls = run_in(tmp_path / "run", finished_run / "teachers"), []

    def once(output):
        calls.append(1)
        return output * float("nan") if len(calls) == 2 else output

    broken(run, once)
    with pytest.raises(SynthesisError, match="1 job"):
        run_stages(run, ("synthesize",))
    assert [note["job"] for note in read_failed(tmp_path / "run" / "work")] == [plan_jobs(run.recipe)[0].id]
    make(tmp_path / "run", finished_run / "teachers")
    assert read_failed(tmp_path / "run" / "work") == []
    assert sha_tree(tmp_path / "run" / "work" / "jobs") == sha_tree(finished_run / "work" / "jobs")
    assert sha_tree(tmp_path / "run" / "dataset") == sha_tree(finished_run / "dataset")


def test_a_job_that_diverges_in_bf16_is_repeated_in_float32(finished_run, tmp_path, monkeypatch, caplog):
    """The outputs of the teacher overflow only under autocast."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = run_in(tmp_path / "run", finished_run / "teachers")
    assert run.precision == "bf16"
    broken(run, lambda output: output * float("inf") if torch.is_autocast_enabled("cpu") else output)
    run_stages(run, ("synthesize",))
    assert read_failed(tmp_path / "run" / "work") == []
    for job in plan_jobs(run.recipe):
        path = f"work/jobs/job-{job.id:05d}.safetensors"
        assert read_proof(tmp_path / "run" / path).notes["precision"] == "float32"
        ours, theirs = (read_tensors(folder / path)["images_uint8"] for folder in (tmp_path / "run", finished_run))
        assert torch.equal(ours, theirs)
    assert {path.name for path in (tmp_path / "run/work/jobs").glob("*checkpoint*")} == set()
    assert caplog.text.count("retrying in float32") == 2


def test_bf16_is_used_where_requested(finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = run_in(tmp_path / "run", finished_run / "teachers")
    seen = set()

    def look(output):
        seen.add(torch.is_autocast_enabled("cpu"))
        return output

    broken(run, look)
    run_stages(run, ("synthesize", "relabel", "package"))
    assert seen == {True, False}, "the final score is computed without autocast"
    assert {read_proof(job_file(run.work, job)).notes["precision"] for job in range(2)} == {"bf16"}
    for name, precision in (("dataset", "bf16"), ("control", "float32")):
        provenance = json.loads((tmp_path / "run" / name / "provenance.json").read_text())
        assert provenance["hardware"]["precision"] == precision


# -- resuming ----------------------------------------------------------------------------------------------------------

KINDS = {
    "drawn teachers": ("teachers.selection=per_iteration", "teachers.draw_probability=0.5", "synthesis.init=noise"),
    "G-VBSM": (
        "synthesis.init=noise", "teachers.selection=cycle", "synthesis.batch_order=within_class", "synthesis.batch_size=4",
        "synthesis.bn_reduction=sum", "synthesis.momentum=0.4", "synthesis.conv={patch: 4, drop: 0.2}",
        "synthesis.densification={size: 8}",
    ),
}  # fmt: skip
STEPS = "synthesis.iterations=12"
STOPS = {"killed": KeyboardInterrupt, "asked to stop": StoppedError}


@pytest.fixture(scope="module")
def undisturbed(finished_run, tmp_path_factory):
    """Return the jobs of a run of each kind, and the objects it has loaded; each run is made once."""
    made = {}

    def get(kind):
        if kind not in made:
            loaded, folder = Loaded(), tmp_path_factory.mktemp("undisturbed") / "run"
            make(folder, finished_run / "teachers", STEPS, *KINDS[kind], wanted=("synthesize",), loaded=loaded)
            made[kind] = sha_tree(folder / "work" / "jobs"), loaded
        return made[kind]

    return get


# The default test run covers both kinds of run, both kinds of end, and the first, a middle and the last step.
ENDS = [
    (kind, at, how) for kind, ats in zip(KINDS, [(1, 6), (2, 6)], strict=True) for at, how in zip(ats, STOPS, strict=True)
]


def stopped(run, at, how):
    """Run until the n-th forward pass of the logit teacher, which is inside a step."""
    calls = []

    def act(output):
        calls.append(torch.is_grad_enabled())
        if calls[-1] and sum(calls) == at:
            if how == "killed":
                raise KeyboardInterrupt
            stop._wanted.set()
        return output

    handle = broken(run, act)
    try:
        with pytest.raises(STOPS[how]):
            run_stages(run, ("synthesize",))
    finally:
        handle.remove()
        stop._wanted.clear()


@pytest.mark.parametrize(("kind", "at", "how"), rest_slow(product(KINDS, [1, 2, 6], STOPS), ENDS))
def test_a_run_that_ends_in_a_job_resumes_to_the_same_bytes(finished_run, undisturbed, tmp_path, caplog, kind, at, how):
    """A run killed in a step keeps the steps before it; a run that is asked to stop finishes the step."""
    expected, loaded = undisturbed(kind)
    words, more = (tmp_path / "run", finished_run / "teachers", STEPS, *KINDS[kind]), {"loaded": loaded}
    stopped(run_in(*words, **more, checkpoint_s=0.0 if how == "killed" else 100.0), at, how)
    asked_in = 2 * at - 1 if kind == "G-VBSM" else at  # two teachers alternate in this run
    jobs, done = tmp_path / "run" / "work" / "jobs", asked_in - (how == "killed")
    checkpoints = list(jobs.glob("*.checkpoint.safetensors"))
    assert len(checkpoints) == (done > 0)
    for path in checkpoints:
        assert f'"step": {done},' in json.dumps(dict(read_proof(path).notes))
    with caplog.at_level("INFO", "prism_hf"):
        make(*words, **more, wanted=("synthesize",))
    resumed = "1 job" if checkpoints else "0 jobs"
    assert f"synthesize: {resumed} to resume from a checkpoint, " in caplog.text
    assert sha_tree(jobs) == expected


def test_the_seal_of_a_job_is_small_and_its_history_is_beside_the_images(finished_run, tmp_path, caplog):
    """The ratios are told once at the first look, whichever job comes first, and once at the end."""
    folder = tmp_path / "run"
    (folder / "work" / "jobs").mkdir(parents=True)
    for path in (finished_run / "work" / "jobs").glob("job-00000.safetensors*"):
        shutil.copy2(path, folder / "work" / "jobs")  # an earlier launch did job 0
    with caplog.at_level("INFO", "prism_hf"):
        make(folder, finished_run / "teachers", wanted=("synthesize",))
    assert "synthesize: 1 of 2 jobs done, 1 to do" in caplog.messages
    assert sum("at the first look: squeeze:" in line for line in caplog.messages) == 2
    path = job_file(folder / "work", 1)
    notes = read_proof(path).notes
    assert set(notes) == {"job", "logit_top1", "verifier_top1", "precision", "ratios"}
    assert all(name.startswith("squeeze:") and value > 0 for name, value in notes["ratios"].items())
    tensors = read_tensors(path)
    assert tensors["history/step"].tolist() == [plan_jobs(tiny())[1].iterations]
    assert {"images_uint8", "history/ce", "history/bn", "history/grad", "history/lr"} <= set(tensors)


def test_a_finished_job_recomputes_no_step(finished_run, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    before, run, calls = mtimes(folder / "work" / "jobs"), run_in(folder, finished_run / "teachers"), []
    broken(run, calls.append)
    with caplog.at_level("INFO", "prism_hf"):
        run_stages(run, ("synthesize",))
    assert calls == []
    assert mtimes(folder / "work" / "jobs") == before
    assert "synthesize: 2 of 2 jobs done, 0 to do" in caplog.messages
    assert "checkpoint" not in caplog.text, "finished work is not mentioned"


def test_a_job_killed_between_writing_images_and_removing_its_checkpoint_leaves_none(finished_run, tmp_path):
    words = (tmp_path / "run", finished_run / "teachers")
    stopped(run_in(*words, checkpoint_s=0.0), 3, "killed")
    for path in (finished_run / "work" / "jobs").iterdir():
        shutil.copy(path, tmp_path / "run" / "work" / "jobs")
    make(*words, wanted=("synthesize",))
    assert sha_tree(tmp_path / "run" / "work" / "jobs") == sha_tree(finished_run / "work" / "jobs")


def test_a_checkpoint_of_another_precision_is_not_used(finished_run, tmp_path, monkeypatch, caplog):
    words = (tmp_path / "run", finished_run / "teachers")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    stopped(run_in(*words, checkpoint_s=0.0), 3, "killed")
    assert [path.name for path in (tmp_path / "run/work/jobs").glob("*.checkpoint*.safetensors")] == [
        "job-00000.checkpoint.bf16.safetensors"
    ]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with caplog.at_level("INFO", "prism_hf"):
        make(*words, wanted=("synthesize",))
    assert "synthesize: 0 jobs to resume from a checkpoint, 2 to start; float32" in caplog.text
    assert sha_tree(tmp_path / "run" / "work" / "jobs") == sha_tree(finished_run / "work" / "jobs")
