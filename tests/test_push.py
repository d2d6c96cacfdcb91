# ruff: noqa: F811
"""`recipes/prism.py --push-to-hub` and what follows: the commands as users type them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_fixtures import connected, hub, online, transport  # noqa: F401
from pipeline import ROOT, TINY, command, launch, tiny

REPO = "org/tiny-prism"
SMALL = (*TINY, "evaluation.seeds=[0]", "squeeze.batch_size=256")
lfs_only = pytest.mark.parametrize("transport", ["lfs"], indirect=True)
xet_only = pytest.mark.parametrize("transport", ["xet"], indirect=True)


def run(hub, home, *words, token="hf_secret_token"):
    """One `accelerate launch` on a machine that knows nothing."""
    env = hub.env(token=token, home=home, xet=True) | {"TQDM_DISABLE": "1"}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("accelerate")), "launch", *map(str, words)],
        env=env, cwd=home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "hf_secret_token" not in done.stdout + done.stderr
    return done


@xet_only
def test_distil_push_load_evaluate(connected, tmp_path):
    maker, reader = tmp_path / "maker", tmp_path / "reader"
    maker.mkdir()
    reader.mkdir()
    recipe = ROOT / "recipes" / "digits" / "prism_ipc10.yaml"
    done = run(connected, maker, ROOT / "recipes/prism.py", recipe, *SMALL, "--output", "run", "--push-to-hub", REPO)
    assert done.returncode == 0, done.stderr[-3000:]
    commit = connected.history("datasets", REPO)[0]
    assert done.stdout.splitlines()[-1] == f"{connected.url}/datasets/{REPO}/commit/{commit}"
    assert len(connected.history("datasets", REPO)) == 2
    assert connected.repo("datasets", REPO).private
    there = connected.files("datasets", REPO)
    folder = maker / "run" / "dataset"
    local = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {k: v for k, v in there.items() if k not in (".gitattributes", "README.md")} == {
        k: v for k, v in local.items() if k != "README.md"
    }
    for place in (maker / "run", *[maker / "huggingface"]):
        leaked = [p for p in place.rglob("*") if p.is_file() and b"hf_secret_token" in p.read_bytes()]
        assert not leaked
    done = run(connected, reader, ROOT / "recipes/evaluate.py", REPO, "--output", "out")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((reader / "out" / "report.json").read_text())
    own = json.loads((maker / "run" / "report.json").read_text())
    scores = {(row["images"], row["labels"]): row for row in report["evaluation"]["rows"]}
    for row in own["evaluation"]["rows"]:
        if row["images"] == "distilled":
            assert scores[row["images"], row["labels"]]["top1"] == row["top1"], "the same data give the same score"


def refused(connected, tmp_path, *words):
    """A launch that ends before any work: nothing is written, nothing is made on the Hub."""
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
        ("hf_secret_token", "other/x", "neither you nor your organisation"),
        ("hf_secret_token", "bad name", "no name of a Hub repo"),
    ],
)
def test_what_would_fail_in_the_morning_fails_now(connected, tmp_path, monkeypatch, capsys, token, repo, words):
    connected.add_user("bob", token="read", role="read", orgs=("org",))
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    refused(connected, tmp_path, "--push-to-hub", repo)
    told = capsys.readouterr().err.strip().splitlines()
    assert words in told[-1]
    assert told[-1].startswith("HubError: ")


@lfs_only
def test_a_dry_run_asks_the_hub_nothing(connected, tmp_path, capsys):
    assert launch("--output", tmp_path / "run", *SMALL, "--dry-run", "--push-to-hub", REPO) == 0
    assert not connected.requests


@pytest.mark.parametrize("option", [["--public"], ["--revision", "x"], ["--create-pr"], ["--replace"]])
def test_options_of_a_push_need_a_push(option, capsys):
    with pytest.raises(SystemExit):
        command().parse(option)
    assert "--push-to-hub" in capsys.readouterr().err


def test_private_and_public_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        command().parse(["--push-to-hub", "a/b", "--public", "--private"])


def test_the_name_of_the_recipe_is_what_the_repo_is_checked_for():
    assert tiny().name == "digits-prism-ipc10"
    assert os.environ["HF_HUB_OFFLINE"] == "1"
