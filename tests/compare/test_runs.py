import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from comparisons import LIGHT, STUDENTS, comparison, facts_of, named
from pipeline import copy_run, launch, mtimes, one_line, run_in, sha_tree, tiny

from prism_hf.compare.comparison import Comparison, StudentSetup, name_of
from prism_hf.compare.methods import RANDOM, under_one_protocol
from prism_hf.compare.runs import check_comparison, make
from prism_hf.errors import OutputError
from prism_hf.recipe.yaml_file import dump_recipe
from prism_hf.run.preflight import check_space, missing_space
from prism_hf.runtime.store import Artifact, read_json, read_proof

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = ("random-real-ipc2", "prism-ipc2", "sre2l-ipc2")


@pytest.fixture
def copied(compared, tmp_path):
    return copy_run(compared[0], tmp_path / "compare")


def again(folder, compared, names=("prism", "sre2l"), **more):
    """Make the comparison as the command does after its checks, and return it with the failed runs."""
    made = comparison(folder, compared[1], named(*names), **more)
    check_comparison(made)
    return made, make(made)


def made_of(folder):
    """Return the computed files, without the notes of launches."""
    parts = ("runs/*/*/work/jobs", "runs/*/*/work/students", "runs/*/*/dataset", "cells")
    return {path: time for part in parts for place in folder.glob(part) for path, time in mtimes(place).items()}


def scores(folder):
    """Return the scores of each run, after checking that every file is as it was written."""
    found = {}
    for path in sorted((folder / "cells").glob("*.json")):
        found[path.name] = Artifact(path, read_proof(path).key).read_json() | {"wall_time_s": 0}
    return found


def test_there_is_a_run_and_a_record_for_each_method_and_seed(compared):
    folder, teachers = compared
    assert sorted(p.relative_to(folder / "runs").as_posix() for p in (folder / "runs").glob("*/*")) == sorted(
        f"{name}/seed-{seed}" for name in NAMES for seed in (0, 1)
    )
    records = scores(folder)
    assert list(records) == sorted(f"{name}-seed{seed}.json" for name in NAMES for seed in (0, 1))
    for record in records.values():
        assert [(s["student"], s["labels"]) for s in record["scores"]] == [
            (s, k) for s in STUDENTS for k in ("soft", "hard")
        ]
        assert all(0 <= score["top1"] <= 1 for score in record["scores"])
        assert record["images"] == 20
    assert {records[f"{name}-seed0.json"]["steps"] for name in NAMES} == {0, 8}
    assert not list(folder.glob("runs/*/*/control"))
    assert len([p for p in teachers.iterdir() if p.name.startswith("test_")]) == 2, "all seeds share the teachers"


def test_seeds_and_methods_produce_different_images(compared):
    tables = {
        sha for place in compared[0].glob("runs/*/*/dataset") for n, sha in sha_tree(place).items() if n.startswith("data/")
    }
    assert len(tables) == 6


def test_a_second_launch_reuses_everything(compared, copied, caplog):
    before = made_of(copied)
    assert len(before) > 60
    with caplog.at_level(logging.INFO, "prism_hf"):
        again(copied, compared)
    assert made_of(copied) == before
    assert "compare: 6 of 6 runs already finished, 0 to run" in caplog.text


@pytest.mark.parametrize("kind", ["record gone", "record damaged", "run gone", "table damaged"])
def test_only_lost_files_are_recreated(compared, copied, kind):
    name, whole = "prism-ipc2-seed1", scores(copied)
    record, run = copied / "cells" / f"{name}.json", copied / "runs" / "prism-ipc2" / "seed-1"
    before = {path: time for path, time in made_of(copied).items() if name not in path and str(run) not in path}
    assert len(before) > 50
    images = sha_tree(run / "dataset")
    if kind == "record damaged":
        record.write_text(record.read_text().replace("top1", "top2", 1))
    elif kind == "record gone":
        record.unlink()
    elif kind == "table damaged":
        (table,) = (run / "dataset" / "data").glob("*.parquet")
        table.write_bytes(b"x" * table.stat().st_size)
    else:
        shutil.rmtree(run)
    made, failed = again(copied, compared)
    assert failed == {}
    after = made_of(copied)
    assert {path: after[path] for path in before} == before
    assert sha_tree(run / "dataset") == images
    assert {n: r for n, r in scores(copied).items() if ".aside-" not in n}[f"{name}.json"]["scores"] == whole[
        f"{name}.json"
    ]["scores"]
    assert len(facts_of(made)["methods"]) == 3


def test_another_method_or_seed_reuses_the_existing_runs(compared, copied):
    before = made_of(copied)
    recipes = [*named("prism", "sre2l"), ("longer", named("prism")[0][1])]
    students = {"students": STUDENTS[:1]}
    make(comparison(copied, compared[1], recipes, seeds=(0,), **students))
    written = ("/cells/", "/dataset/README.md", "/assets/diversity.png", "/report.json")
    kept = {path: time for path, time in before.items() if not any(part in path for part in written)}
    after = made_of(copied)
    assert {path: after[path] for path in kept} == kept, "fewer students change only the record"
    assert (copied / "runs" / "longer-ipc2" / "seed-0" / "dataset").is_dir()
    before = made_of(copied)
    make(comparison(copied, compared[1], named("prism"), seeds=(0, 2), **students))
    after = made_of(copied)
    assert {path: after[path] for path in before} == before
    new = {Path(path).relative_to(copied).parts[1:3] for path in after if path not in before and "/runs/" in path}
    assert new == {("random-real-ipc2", "seed-2"), ("prism-ipc2", "seed-2")}


def test_a_run_equals_one_made_by_the_distill_command(compared, tmp_path):
    folder, teachers = compared
    made = comparison(folder, teachers, named("prism", "sre2l"))
    run = next(run for run in made.runs if name_of(run) == "prism-ipc2-seed1")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(run.recipe))
    for stage in ("synthesize", "relabel", "package"):
        words = ("--output", tmp_path / "run", "--teachers", teachers, "--threads", "1", "--stage", stage)
        assert launch(*words, recipe=tmp_path / "recipe.yaml") == 0
    theirs, ours = sha_tree(tmp_path / "run" / "dataset"), sha_tree(folder / "runs" / "prism-ipc2" / "seed-1" / "dataset")
    # The comparison has already scored the run, and says so.
    card = (folder / "runs" / "prism-ipc2" / "seed-1" / "dataset" / "README.md").read_text()
    assert "| distilled | 20 | soft |" in card
    assert "Left out: random real (a separate run of the same comparison" in card
    assert ours.pop("assets/diversity.png")
    assert theirs.pop("README.md") != ours.pop("README.md")
    assert theirs == ours


def test_the_disk_must_have_room_for_all_runs(tmp_path):
    """Each of the eight runs would fit alone, even with a control; so do the last four once the others are finished."""
    folder = tmp_path / "run"
    free, one = shutil.disk_usage(tmp_path).free, missing_space(run_in(folder, folder, "relabel.epochs=1000000000"))
    words = *LIGHT, f"relabel.epochs={int(0.4 * free / one * 1e9)}"
    recipe = tiny(*words)
    check_space(missing_space(run_in(folder, folder, *words)), tmp_path)
    made = comparison(tmp_path / "compare", tmp_path / "teachers", [("prism", recipe)], seeds=(0, 1, 2, 3))
    with pytest.raises(OutputError, match="needs about .* is free") as error:
        check_comparison(made)
    assert one_line(error)
    assert not (tmp_path / "compare").exists()
    check_comparison(comparison(tmp_path / "compare", tmp_path / "teachers", [("prism", recipe)], seeds=(0,)))
    for run in made.runs[:4]:
        Artifact(tmp_path / "compare" / "cells" / f"{name_of(run)}.json", "key").write_json({})
    check_comparison(made)


def test_the_first_student_must_use_all_views():
    methods, _ = under_one_protocol(named("prism"))
    with pytest.raises(ValueError, match="expected a setup of 'test_byobnet' with all views"):
        Comparison(
            methods, [StudentSetup("test_byobnet", "soft", 1)], [0], folder=Path(), teachers_root=Path(), accelerator=None
        )


def test_a_method_with_a_non_finite_loss_is_left_out(compared, tmp_path, caplog):
    AcceleratorState._reset_state(True)
    with caplog.at_level(logging.INFO, "prism_hf"):
        made, failed = again(tmp_path / "bad", compared, ("prism", "bad"), seeds=(0,), students=STUDENTS[:1])
    assert list(failed) == ["bad-ipc2-seed0"]
    assert "the comparison continues without it" in caplog.text
    told = [line for line in caplog.messages if "runs done" in line]
    assert [line.partition(", about")[0] for line in told] == [
        f"{label}, seed 0: {number} of 3 runs done" for number, label in enumerate(("random real", "prism", "bad"), 1)
    ]
    assert [line.endswith(" left") for line in told] == [True, True, False], "the estimate counts this launch only"
    found = facts_of(made, failed)
    assert [method["label"] for method in found["methods"]] == ["random real", "prism"]
    assert {row["method"] for row in found["scores"]} == {"random real", "prism"}
    assert "not finite" in found["left_out"]["bad-ipc2-seed0"]
    assert "not yet run" not in [reason for name, reason in found["left_out"].items() if name.startswith("bad")]
    assert json.dumps(found, allow_nan=False)


def test_the_first_method_alone_decides_which_network_measures_similarity(compared, tmp_path):
    other = [("other", tiny(*LIGHT, "teachers.logit=squeeze:test_efficientnet", "teachers.bn_pool=[]", "name=other"))]
    found = {}
    for recipes in (named("prism") + other, other + named("prism")):
        folder = copy_run(compared[0], tmp_path / recipes[0][0])  # a record that does not fit is set aside
        made = comparison(folder, compared[1], recipes)
        run = next(run for run in made.runs if run.title.startswith("prism"))
        found[made.network.name] = made.is_made(run)
    assert found == {"squeeze:test_byobnet": True, "squeeze:test_efficientnet": False}


def test_every_seed_runs_with_every_set_of_teachers_and_the_sets_are_the_sample(compared, tmp_path):
    folder, teachers = tmp_path / "compare", tmp_path / "teachers"
    shutil.copytree(compared[1], teachers)  # teachers of seed 0
    made = comparison(folder, teachers, named("prism"), students=STUDENTS[:1])
    made = dataclasses.replace(made, teacher_seeds=(0, 1))
    check_comparison(made)
    assert make(made) == {}
    runs = sorted(path.relative_to(folder / "runs").as_posix() for path in (folder / "runs").glob("*/*"))
    draws = [f"teachers-{t}-seed-{s}" for t in (0, 1) for s in (0, 1)]
    assert runs == sorted(f"{name}/{draw}" for name in NAMES[:2] for draw in draws)
    seeds = {read_json(path)["settings"]["seed"] for path in teachers.glob("test_*/squeeze.json")}
    assert seeds == {0, 1}
    found = facts_of(made)
    for row in found["scores"]:
        assert (row["seeds"], row["teacher_seeds"]) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert found["protocol"]["teacher_seeds"] == [0, 1]
    for label in ("soft", "hard"):
        ours, control = (
            next(r for r in found["scores"] if (r["method"], r["labels"]) == (m, label)) for m in ("prism", RANDOM)
        )
        gaps = [a - b for a, b in zip(ours["top1"], control["top1"], strict=True)]
        sets = [(gaps[0] + gaps[2]) / 2, (gaps[1] + gaps[3]) / 2]
        entry = next(e for e in found["differences"] if e["labels"] == label)
        assert entry["difference"] == pytest.approx(sum(sets) / 2)
        assert entry["half_width"] == pytest.approx(12.7062 * abs(sets[0] - sets[1]) / 2, rel=1e-4, abs=1e-12)
    # A second launch makes nothing again, and one that makes a share leaves the rest.
    before = made_of(folder)
    assert make(made) == {}
    assert made_of(folder) == before
    assert [run.title for run in made.runs[:3]] == [
        "random real, seed 0, teachers 0", "prism, seed 0, teachers 0", "random real, seed 0, teachers 1",
    ]  # fmt: skip
