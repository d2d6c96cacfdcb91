import json
import math
import statistics

import pytest
import torch
from comparisons import STUDENTS, comparison, facts_of, named

from prism_hf.compare.findings import findings
from prism_hf.dataset.reader import load_distilled

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LABELS = ["random real", "prism", "sre2l"]
KEYS = [(student, labels) for student in STUDENTS for labels in ("soft", "hard")]


@pytest.fixture(scope="module")
def made(compared):
    return comparison(*compared, named("prism", "sre2l"))


@pytest.fixture(scope="module")
def found(made):
    return facts_of(made)


def recorded(folder, label, seed, place):
    slug = label.replace(" ", "-")
    return json.loads((folder / "cells" / f"{slug}-ipc2-seed{seed}.json").read_text())["scores"][place]["top1"]


def test_every_score_is_reported_with_its_seeds(compared, found):
    rows = {(row["method"], row["student"], row["labels"]): row for row in found["scores"]}
    assert set(rows) == {(label, *key) for label in LABELS for key in KEYS}
    for (label, *key), row in rows.items():
        top1 = [recorded(compared[0], label, seed, KEYS.index(tuple(key))) for seed in (0, 1)]
        assert (row["seeds"], row["top1"], row["ipc"]) == ([0, 1], top1, 2)
        assert row["mean"] == pytest.approx(sum(top1) / 2)
        assert row["std"] == pytest.approx(abs(top1[0] - top1[1]) / math.sqrt(2))


def test_differences_are_between_means_and_have_intervals(compared, found):
    rows = {(row["a"], row["b"], row["student"], row["labels"]): row for row in found["differences"]}
    pairs = [("prism", "random real"), ("sre2l", "random real"), ("sre2l", "prism")]
    assert set(rows) == {(*pair, *key) for pair in pairs for key in KEYS}
    for (a, b, *key), row in rows.items():
        one, two = ([recorded(compared[0], x, seed, KEYS.index(tuple(key))) for seed in (0, 1)] for x in (a, b))
        gaps = [x - y for x, y in zip(one, two, strict=True)]
        assert row["difference"] == pytest.approx(statistics.fmean(gaps))
        assert row["half_width"] == pytest.approx(12.706 * statistics.stdev(gaps) / math.sqrt(2), rel=1e-4)


def test_one_seed_has_no_interval(compared):
    found = facts_of(comparison(*compared, named("prism", "sre2l"), seeds=(1,)))
    assert {row["half_width"] for row in found["differences"]} == {None}
    assert {row["std"] for row in found["scores"]} == {None}
    assert all(method["similarity"]["std_over_seeds"] is None for method in found["methods"])
    json.dumps(found, allow_nan=False)


def test_the_protocol_has_the_requested_seeds_and_students(found):
    evaluation = found["protocol"]["evaluation"]
    assert (evaluation["seeds"], evaluation["student"]) == ([0, 1], list(STUDENTS))


def test_methods_have_their_facts(compared, found):
    methods = {method["label"]: method for method in found["methods"]}
    assert list(methods) == LABELS
    assert [method["control"] for method in methods.values()] == [True, False, False]
    assert [method["image_steps"] for method in methods.values()] == [0, 80, 80]
    for method in methods.values():
        assert method["seeds"] == [0, 1]
        assert len(method["points"]["xy"]) == len(method["points"]["label"]) == 20
        assert len(method["similarity"]["per_class"]) == 10
        assert method["histogram"]["edges"][0] == -1
        assert method["verifier_top1"] is None
    assert len(found["real"]["points"]["xy"]) == 1000
    assert found["protocol"]["seeds"] == [0, 1]
    assert set(found["protocol"]["teachers"]) == {"squeeze:test_byobnet", "squeeze:test_efficientnet"}
    assert found["left_out"] == {"all real": "not yet run: evaluation.full_data_epochs is 0"}


def test_pictures_are_the_images_of_the_first_run(compared, made):
    _, images = findings(made, {}, notes=[], command="")
    assert list(images) == LABELS
    for label, images_uint8 in images.items():
        folder = compared[0] / "runs" / f"{label.replace(' ', '-')}-ipc2" / "seed-0" / "dataset"
        assert torch.equal(images_uint8, load_distilled(folder).images_uint8)


def test_facts_contain_no_local_paths(compared, found):
    text = json.dumps(found, allow_nan=False)
    assert str(compared[0].parent) not in text
    assert str(compared[1].parent) not in text


def test_missing_runs_are_listed(compared):
    found = facts_of(comparison(*compared, [*named("prism"), ("other", named("sre2l")[0][1])]))
    assert [method["label"] for method in found["methods"]] == LABELS[:2]
    assert found["left_out"]["other, ipc 2"] == "not yet run"
