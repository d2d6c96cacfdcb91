"""The tables of docs/comparison.md, their rows and format, and the import of the original Fashion-MNIST files."""

import argparse
import gzip
import struct
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from each import each
from pipeline import one_line, recipe_script

from prism_hf.cli.options import run_command
from prism_hf.compare.methods import under_one_protocol
from prism_hf.errors import DataError
from prism_hf.recipe.yaml_file import differing_keys

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import fashion  # noqa: E402
import tables  # noqa: E402


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_rows_of_a_table_have_one_protocol_and_a_control(name):
    table = tables.TABLES[name]
    methods, _ = under_one_protocol([(row[0], tables.recipe_of(row, table, None)) for row in table.rows], own=table.own)
    real = sum(row[1].startswith(tables.RANDOM) for row in table.rows)
    assert sum(method.control for method in methods) == max(1, real)
    protocols = {
        tuple(method.recipe.fingerprint(section) for section in ("data", "squeeze", "evaluation", "packaging"))
        for method in methods
    }
    assert len(protocols) == 1
    assert f"{table.images}-{name}" in fashion.SECTIONS


@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_methods_have_the_same_iterations_and_labels(ipc):
    methods, _ = under_one_protocol(
        [(row[0], tables.recipe_of(row, tables.Table(()), None)) for row in tables.methods_at(ipc)]
    )
    others = [method.recipe for method in methods if not method.control]
    if ipc == 10:  # the previous choice stays in the table
        assert differing_keys(others.pop(), others[-2]) == ["synthesis.easiest"]
    assert len(others) == 7
    *optimized, chosen = others
    assert {recipe.synthesis.iterations for recipe in optimized} == {100}
    assert differing_keys(optimized[-1], chosen) == ["synthesis.iterations"]
    assert chosen.synthesis.iterations == 0
    assert len({recipe.relabel for recipe in others}) == 1
    assert {recipe.synthesis.ipc for recipe in others} == {ipc}


def test_a_switch_changes_only_the_keys_it_names():
    table = tables.TABLES["switches"]
    base, *others = [tables.recipe_of(row, table, None) for row in table.rows]
    for row, recipe in zip(table.rows[1:], others, strict=True):
        changed = set(differing_keys(base, recipe))
        named = {override.partition("=")[0] for override in row[2]}
        assert changed
        assert all(any(key == name or key.startswith(f"{name}.") for name in named) for key in changed), row[0]


def toy(mean_a, mean_b, *, seeds=(0, 1)):
    def score(method, labels, top1):
        values = [top1 - 0.01, top1 + 0.01][: len(seeds)]
        std = 0.0141 if len(seeds) > 1 else None
        return {
            "method": method, "ipc": 10, "student": "net", "labels": labels, "seeds": list(seeds), "top1": values,
            "mean": top1, "std": std, "count": 100, "label_bytes": 1234.0,
        }  # fmt: skip

    def method(label, control):
        return {
            "label": label, "control": control, "ipc": 10, "similarity": {"mean": 0.9}, "verifier_top1": 1.0,
            "seconds_per_image": 0.5, "image_bytes": 1000.0, "label_bytes": 2000.0,
        }  # fmt: skip

    return {
        "command": "make it",
        "hardware": {"cpu": "CPU", "cores": 2, "processes": 2},
        "data": {"test_count": 10_000},
        "protocol": {"seeds": list(seeds), "relabel": {"epochs": 3}, "evaluation": {"epochs": 3}},
        "methods": [method("random real", True), method("ours", False)],
        "scores": [
            score(name, kind, top1)
            for name, top1 in (("random real", mean_b), ("ours", mean_a))
            for kind in ("soft", "hard")
        ],
        "full_data": [{"student": "net", "labels": "hard", "top1": [0.9], "mean": 0.9, "std": None, "count": 60_000}],
        "real": {"similarity": {"mean": 0.8}},
    }


@each("gap, word", [(0.1, "**above**"), (0.0, "level"), (-0.1, "*below*")])
@each("section", [name for name in fashion.SECTIONS if name != "fashion-labels"])
def test_a_table_states_which_method_is_better(section, gap, word):
    text = fashion.SECTIONS[section](toy(0.7 + gap, 0.7))
    assert "| ours" in text
    assert f"{100 * (0.7 + gap):.1f}" in text
    if section != "fashion-students" and "convergence" not in section:
        first_is_ours = fashion.SECTIONS[section] is fashion.against_first
        wanted = {"**above**": "*below*", "*below*": "**above**", "level": "level"}[word] if first_is_ours else word
        assert wanted in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_a_table_gives_no_verdict_from_one_seed():
    assert "(one seed)" in fashion.methods_table(toy(0.8, 0.7, seeds=(0,)))


def test_the_short_table_has_both_datasets_and_says_what_was_not_run():
    results = {"fashion-final-ipc10": toy(0.8, 0.7), "openclipart-final-64-ipc10": toy(0.6, 0.5)}
    head, _, ours, extra = fashion.few_table(results, ("ours", "extra")).splitlines()
    assert head.count("|") == ours.count("|") == extra.count("|") == 6
    assert "Fashion-MNIST, soft" in head
    assert "80.0" in ours
    assert "60.0" in ours
    assert extra.count("*not yet run*") == 4
    assert fashion.few_table({}) == "*not yet run*"


def test_the_labels_table_shows_the_size_of_the_labels():
    text = fashion.labels_table(toy(0.8, 0.7))
    assert "| views of 3 epochs | 1.23 kB |" in text


def idx(path, array):
    magic = 2049 if array.ndim == 1 else 2051
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes())


@pytest.fixture
def authors(tmp_path, monkeypatch):
    """Return the conversion script and a folder with the four files, with few images."""
    spec = recipe_script("fashion/to_parquet")
    monkeypatch.setitem(spec.SPLITS, "train", ("train", 20))
    monkeypatch.setitem(spec.SPLITS, "test", ("t10k", 10))
    rng = np.random.default_rng(0)
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, count in (("train", 20), ("t10k", 10)):
        idx(folder / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return spec, folder


def to_parquet(spec, source, out, capsys):
    code = run_command(spec.main, argparse.Namespace(source=source, out=out, debug=False))
    return code, capsys.readouterr()


def test_the_original_files_become_a_dataset(authors, tmp_path, capsys):
    spec, folder = authors
    code, said = to_parquet(spec, folder, tmp_path / "out", capsys)
    assert code == 0
    assert "20 train, 10 test" in said.out
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features["label"].names[9] == "Ankle boot"
    assert rows["label"] == [n % 10 for n in range(20)]
    pixels = spec.read_idx(folder / "train-images-idx3-ubyte.gz", spec.IMAGES)
    assert np.array_equal(np.asarray(rows[7]["image"]), pixels[7])


@pytest.mark.parametrize("harm", ["missing", "cut", "labels for images", "not gzip", "other count"])
def test_invalid_source_files_leave_the_existing_output_unchanged(authors, tmp_path, capsys, harm):
    spec, folder = authors
    out = tmp_path / "out"
    assert to_parquet(spec, folder, out, capsys)[0] == 0
    before = sorted((p.name, p.read_bytes()) for p in out.iterdir())
    images = folder / "t10k-images-idx3-ubyte.gz"
    match harm:
        case "missing":
            images.unlink()
        case "cut":
            images.write_bytes(images.read_bytes()[:-200])
        case "labels for images":
            images.write_bytes((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
        case "not gzip":
            images.write_bytes(b"nothing")
        case "other count":
            idx(images, np.zeros((9, 28, 28)))
    code, said = to_parquet(spec, folder, out, capsys)
    assert code == 2
    assert one_line(said.err.strip()).startswith(DataError.__name__)
    assert sorted((p.name, p.read_bytes()) for p in out.iterdir()) == before
