# ruff: noqa: F811
"""`recipes/prism.py --push-to-hub` and the commands after it, as users type them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_fixtures import connected, hub, online, transport  # noqa: F401
from hub_server import Status
from huggingface_hub import ModelCard
from pipeline import ROOT, TINY, launch

from prism_hf.cli.main import main

REPO = "org/tiny-prism"
SMALL = (*TINY, "evaluation.seeds=[0]", "squeeze.batch_size=256")
lfs_only = pytest.mark.parametrize("transport", ["lfs"], indirect=True)
xet_only = pytest.mark.parametrize("transport", ["xet"], indirect=True)


@pytest.mark.slow  # its parts run by default, in this folder and in test_round_trip.py
@xet_only
def test_distill_push_load_evaluate(connected, tmp_path, capsys):
    run, reader = tmp_path / "run", tmp_path / "reader"
    reader.mkdir()
    assert launch("--output", run, *SMALL, "--push-to-hub", REPO) == 0
    told = capsys.readouterr()
    commits = connected.history("datasets", REPO)
    assert told.out.splitlines()[-1] == f"{connected.url}/datasets/{REPO}/commit/{commits[0]}"
    assert len(commits) == 2
    assert connected.repo("datasets", REPO).private
    there, folder = connected.files("datasets", REPO), run / "dataset"
    local = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    beside = (".gitattributes", "README.md")
    assert {k: v for k, v in there.items() if k not in beside} == {k: v for k, v in local.items() if k not in beside}
    assert not [p for p in run.rglob("*") if p.is_file() and b"hf_secret_token" in p.read_bytes()]
    assert "hf_secret_token" not in told.out + told.err
    # Another user on another machine, with the command as typed.
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    done = subprocess.run(
        [accelerate, "launch", str(ROOT / "recipes/evaluate.py"), REPO, "--output", "out"],
        env=connected.env(token="hf_secret_token", home=reader, xet=True) | {"TQDM_DISABLE": "1"},
        cwd=reader, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hf_secret_token" not in done.stdout + done.stderr
    report, own = (json.loads((place / "report.json").read_text()) for place in (reader / "out", run))
    scores = {(row["images"], row["labels"]): row["top1"] for row in report["evaluation"]["rows"]}
    mine = [row for row in own["evaluation"]["rows"] if row["images"] == "distilled"]
    assert len(mine) == 2
    assert all(scores[row["images"], row["labels"]] == row["top1"] for row in mine), "the same data gives the same score"
    # The student that the run kept, with a link to its training data.
    assert main(["push", str(run / "student"), "org/tiny-student", "--dataset", REPO]) == 0
    card = ModelCard(connected.files("models", "org/tiny-student")["README.md"].decode())
    assert card.data.datasets == [REPO]
    assert card.data.eval_results[0].metric_value == mine[0]["top1"][0]


@lfs_only
def test_a_failed_push_at_the_end_still_reports_the_scores(connected, tmp_path, capsys, caplog):
    caplog.set_level("INFO", logger="prism_hf")
    connected.fault("commit", Status(403), times=None)
    assert launch("--output", tmp_path / "run", *SMALL, "--push-to-hub", REPO) == 2
    told = capsys.readouterr()
    assert told.err.strip().splitlines()[-1].startswith("HubError: ")
    assert "top-1 %" in caplog.text
    assert "top-1 %" not in told.out
    assert (tmp_path / "run" / "report.json").is_file()
    # The same command reuses everything and only publishes.
    connected.clear_faults()
    assert launch("--output", tmp_path / "run", *SMALL, "--push-to-hub", REPO) == 0
    assert "random real" in capsys.readouterr().out
    assert len(connected.history("datasets", REPO)) == 2


def refused(connected, tmp_path, *words):
    """Launch, and check that it is refused before any work: nothing is written locally or created on the Hub."""
    assert launch("--output", tmp_path / "run", *SMALL, *words) == 2
    assert not (tmp_path / "run").exists()
    assert not connected.exists("datasets", REPO)


@lfs_only
@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (None, REPO, "no Hugging Face token"),
        ("hf_unknown", REPO, "does not accept the token"),
        ("read", REPO, "can only read"),
        ("hf_secret_token", "other/x", "neither you nor your organization"),
        ("hf_secret_token", "bad name", "not a valid Hub repo name"),
    ],
)
def test_a_push_that_would_fail_is_refused_before_the_run(connected, tmp_path, monkeypatch, capsys, token, repo, words):
    connected.add_user("bob", token="read", role="read", orgs=("org",))
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    refused(connected, tmp_path, "--push-to-hub", repo)
    told = capsys.readouterr().err.strip().splitlines()
    assert words in told[-1]
    assert told[-1].startswith("HubError: ")


@lfs_only
def test_a_dry_run_sends_no_request_to_the_hub(connected, tmp_path, capsys):
    assert launch("--output", tmp_path / "run", *SMALL, "--dry-run", "--push-to-hub", REPO) == 0
    assert not connected.requests


@pytest.mark.parametrize("option", [["--public"], ["--revision", "x"], ["--create-pr"], ["--replace"]])
def test_push_options_require_a_push(option, capsys):
    with pytest.raises(SystemExit):
        main(["distill", *option])
    assert "--push-to-hub" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["squeeze", "synthesize", "relabel"])
def test_a_stage_that_packages_nothing_cannot_be_pushed(stage, capsys):
    assert launch("--push-to-hub", "a/b", "--stage", stage) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"HubError: --stage {stage} does not make a dataset to push")


def test_private_and_public_are_mutually_exclusive(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--push-to-hub", "a/b", "--public", "--private"])
    assert "not allowed with" in capsys.readouterr().err
