# ruff: noqa: F811
import importlib
import tomllib

import datasets
import pytest
from hub_fixtures import connected, hub, online, transport  # noqa: F401
from pipeline import ROOT, add_card, small_set

from prism_hf.cli.main import main, parse

SET = "org/small"
lfs_only = pytest.mark.parametrize("transport", ["lfs"], indirect=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    recipe, names, *_ = small_set(folder)
    add_card(folder, recipe, names)
    return folder


def test_the_installed_command_calls_this_module():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["prism-hf"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


def test_private_is_the_default():
    assert parse(["push", "x", "a/b"]).public is False
    assert parse(["push", "x", "a/b", "--private"]).public is False
    assert parse(["push", "x", "a/b", "--public"]).public is True


@pytest.mark.parametrize(
    "words", [[], ["push"], ["push", "x"], ["verify"], ["export", "x", "y"], ["export", "x", "y", "--format", "z"]]
)
def test_an_incomplete_command_prints_the_usage(words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(words)
    assert end.value.code == 2
    assert "usage: prism-hf" in capsys.readouterr().err


@lfs_only
def test_the_url_is_the_last_line_also_of_the_second_push(connected, folder, capsys):
    assert main(["push", str(folder), SET]) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    assert first == f"{connected.url}/datasets/{SET}/commit/{connected.history('datasets', SET)[0]}"
    assert main(["push", str(folder), SET]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == first


@lfs_only
def test_an_error_is_one_line_and_exit_code_two(connected, folder, tmp_path, capsys):
    assert main(["push", str(tmp_path), SET]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].startswith("HubError: ")
    assert not connected.requests


def test_verify_distinguishes_a_good_folder_from_a_damaged_one(folder, tmp_path, capsys):
    assert main(["verify", str(folder)]) == 0
    assert "no differences" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 1
    assert "provenance.json" in capsys.readouterr().out


def test_export_writes_files_that_other_libraries_read(folder, tmp_path, capsys):
    assert main(["export", str(folder), str(tmp_path / "images"), "--format", "imagefolder"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "images")
    read = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "images"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert read.num_rows == 12
    assert main(["export", str(folder), str(tmp_path / "images"), "--format", "imagefolder"]) == 2
    assert "OutputError" in capsys.readouterr().err
