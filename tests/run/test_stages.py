import json
import shutil
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from each import each
from pipeline import PYTHON, RECIPE, ROOT, TINY, copy_run, launch, make, mtimes, quiet_env, random_picture, sha_tree, tiny

from prism_hf.dataset.reader import load_distilled
from prism_hf.images.source import load_source
from prism_hf.method.start_images import real_rows
from prism_hf.recipe.plan import STAGES
from prism_hf.run.status import survey
from prism_hf.runtime.store import SEAL
from prism_hf.runtime.tensors import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LIGHT = ("evaluation.full_data_epochs=0", "evaluation.seeds=[0,1]")


def go(folder, *words, teachers=None):
    words = [*TINY, *words, "--output", folder, "--threads", "1"]
    return launch(*words, *(["--teachers", teachers] if teachers else []))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert go(folder) == 0
    return folder


@pytest.fixture(scope="module")
def light(done, tmp_path_factory):
    """A finished run without the expensive ceiling row, for tests that copy and damage it."""
    folder = tmp_path_factory.mktemp("runs") / "light"
    assert go(folder, *LIGHT, teachers=done / "teachers") == 0
    return folder


@pytest.fixture
def copied(light, tmp_path):
    return copy_run(light, tmp_path / "copy")


# -- without a control ---------------------------------------------------------------------------------------------------


def test_a_run_without_a_control_says_so(copied, light, done):
    """The scores of a control that exists are kept, and a launch without the option shows them again."""
    before = json.loads((copied / "report.json").read_text())
    assert go(copied, *LIGHT, "--no-control", "--stage", "evaluate", teachers=done / "teachers") == 0
    evaluation = json.loads((copied / "report.json").read_text())["evaluation"]
    assert {row["images"] for row in evaluation["rows"]} == {"distilled"}
    assert evaluation["left_out"]["random real"] == "not yet run: --no-control was given"
    assert evaluation["in_words"].startswith("There is no random-real control to compare with.")
    card = (copied / "dataset" / "README.md").read_text()
    assert "--no-control was given" in card
    assert "*Random real* is" not in card
    assert go(copied, *LIGHT, "--stage", "evaluate", teachers=done / "teachers") == 0
    assert json.loads((copied / "report.json").read_text())["evaluation"] == before["evaluation"]


@pytest.mark.slow
def test_a_run_without_a_control_makes_none_until_it_is_wanted(tmp_path, light, done):
    assert go(tmp_path / "run", *LIGHT, "--no-control", teachers=done / "teachers") == 0
    assert not (tmp_path / "run" / "control").exists()
    assert not (tmp_path / "run" / "work" / "random_real").exists()
    assert survey(tmp_path / "run")["stages"]["package"] | {"seconds": 0} == {
        "done": 1,
        "of": 1,
        "unit": "folder",
        "seconds": 0,
    }
    assert go(tmp_path / "run", *LIGHT, teachers=done / "teachers") == 0
    for name in ("dataset", "control"):
        assert sha_tree(tmp_path / "run" / name / "data") == sha_tree(light / name / "data")


@each("words, line", [
    ([], "control   as many random real images, relabeled by the same teachers"),
    (["--no-control"], "control   none (--no-control)"),
    (["fashion/random_ipc10"], "control   none: these are random real images, the control that other methods"),
])  # fmt: skip
def test_the_plan_says_what_the_control_is(capsys, words, line):
    from prism_hf.cli.main import main

    assert main(["distill", "--dry-run", *(words if "/" in str(words) else ["digits/prism_ipc10", *words])]) == 0
    out = capsys.readouterr().out
    assert line in out
    assert ("including the control" in out) == (words == [])


# -- the results of a run ---------------------------------------------------------------------------------------------


def test_the_folder_is_complete(done):
    files = set(sha_tree(done))
    tables = {f"{config}/train-00000-of-00001.parquet" for config in ("data", "views")}
    common = tables | {"README.md", "recipe.yaml", "provenance.json"}
    pictures = {"assets/grid.png", "assets/diversity.png"}
    assert {f.removeprefix("dataset/") for f in files if f.startswith("dataset/")} == common | pictures
    assert {f.removeprefix("control/") for f in files if f.startswith("control/")} == common
    assert {"recipe.yaml", "report.json", "work/times.json"} <= files
    assert {Path(f).name for f in files if f.startswith("work/jobs")} == {
        f"job-{i:05d}.safetensors{seal}" for i in range(2) for seal in ("", SEAL)
    }
    rest = {f.split("/")[0] for f in files}
    assert rest == {".lock", "logs", "recipe.yaml", "report.json", "dataset", "control", "student", "work", "teachers"}
    student = {f.removeprefix("student/") for f in files if f.startswith("student/")}
    assert student == {"config.json", "model.safetensors", "student.json"}


def test_the_report_is_complete(done):
    report = json.loads((done / "report.json").read_text())
    rows = {(row["images"], row["labels"]): row for row in report["evaluation"]["rows"]}
    assert list(rows) == [
        ("distilled", "soft"), ("random_real", "soft"), ("distilled", "hard"), ("random_real", "hard"), ("full", "hard"),
    ]  # fmt: skip
    for (images, _), row in rows.items():
        assert row["seeds"] == [0, 1, 2]
        assert len(row["top1"]) == 3
        assert row["mean"] == pytest.approx(np.mean(row["top1"]))
        assert row["std"] == pytest.approx(np.std(row["top1"], ddof=1))
        assert row["count"] == (1347 if images == "full" else 20)
    assert report["evaluation"]["test_count"] == 450
    for name in ("distilled", "random_real"):
        facts = report["evaluation"]["sets"][name]
        assert facts["image_bytes"] > 1000
        assert facts["label_bytes"] > 1000
        assert len(facts["intra_class_similarity"]["per_class"]) == 10
    assert list(report["wall_time_s"]) == list(STAGES)
    assert set(report["teachers_test_top1"]) == {"squeeze:test_byobnet", "squeeze:test_efficientnet"}
    assert [job["job"] for job in report["jobs"]] == [0, 1]
    assert report["recipe_fingerprint"] == tiny().fingerprint()
    assert report["hardware"]["threads"] == 1
    assert report["evaluation"]["left_out"] == {}
    assert "distilled minus random real" in report["evaluation"]["in_words"]


def test_the_kept_student_is_the_first_one_in_the_table(done):
    facts, report = (json.loads((done / name).read_text()) for name in ("student/student.json", "report.json"))
    row = report["evaluation"]["rows"][0]
    assert (row["images"], row["labels"]) == ("distilled", "soft")
    assert (facts["seed"], facts["test_top1"], facts["test_count"]) == (row["seeds"][0], row["top1"][0], 450)
    assert (facts["architecture"], facts["epochs"], facts["channels"]) == ("test_byobnet", 2, 1)
    distilled = load_distilled(done / "dataset")
    name = tiny().name
    assert facts["dataset"] == {"name": name, "content": distilled.content, "images": 20, "hub_id": None}
    source = json.loads((done / "dataset" / "provenance.json").read_text())["source"]
    assert facts["source"] | {"images_per_class": source["images_per_class"]} == source
    assert facts["recipe_fingerprint"] == tiny().fingerprint()
    assert timm.create_model(f"local-dir:{done / 'student'}", pretrained=True).num_classes == 10


def test_dataset_and_control_contain_the_expected_images(done):
    source = load_source(tiny().data)
    distilled, control = load_distilled(done / "dataset"), load_distilled(done / "control")
    rows = real_rows(source, 2, seed=0)
    images, labels = source.train.images(rows), torch.from_numpy(source.train.labels[rows])
    assert torch.equal(control.images_uint8, images)
    assert torch.equal(control.labels, labels)
    assert torch.equal(distilled.labels, labels)
    assert not torch.equal(distilled.images_uint8, images)
    assert distilled.num_epochs == control.num_epochs == 2
    for epoch in range(2):
        ours, theirs = distilled.epoch(epoch)[0], control.epoch(epoch)[0]
        assert torch.equal(ours.image_index, theirs.image_index), "the same protocol: the same views"
        assert torch.equal(ours.view.crop, theirs.view.crop)
    jobs = datasets.load_dataset(str(done / "dataset"), split="train")["job"][:]
    assert jobs == [0, 1] * 10
    assert set(datasets.load_dataset(str(done / "control"), split="train")["job"][:]) == {-1}
    for job in range(2):
        kept = read_tensors(done / "work" / "jobs" / f"job-{job:05d}.safetensors")["images_uint8"]
        assert torch.equal(kept, distilled.images_uint8[job::2])


def test_the_card_has_scores_and_no_local_paths(done):
    card = (done / "dataset" / "README.md").read_text()
    assert "Not yet run" not in card
    assert "| all real | 1347 | hard |" in card
    for text in (card, (done / "dataset" / "provenance.json").read_text(), (done / "dataset" / "recipe.yaml").read_text()):
        assert str(done.parent) not in text


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_a_second_launch_changes_no_byte_and_trains_nothing(done):
    kept = ("teachers", "work/jobs", "work/distilled", "work/random_real", "work/students", "student")
    dataset, control = sha_tree(done / "dataset"), sha_tree(done / "control")
    before = {path: time for path, time in mtimes(done).items() if any(f"done/{part}" in path for part in kept)}
    assert len(before) > 20
    assert go(done) == 0
    assert (sha_tree(done / "dataset"), sha_tree(done / "control")) == (dataset, control)
    after = mtimes(done)
    assert {path: after[path] for path in before} == before


def test_stage_by_stage_gives_the_same_bytes_as_all_at_once(light, tmp_path):
    for stage in STAGES:
        assert go(tmp_path / "out", *LIGHT, "--stage", stage) == 0
    assert sha_tree(tmp_path / "out" / "dataset") == sha_tree(light / "dataset")
    assert sha_tree(tmp_path / "out" / "control") == sha_tree(light / "control")
    assert sha_tree(tmp_path / "out" / "student") == sha_tree(light / "student")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["wall_time_s"]) == list(STAGES)
    assert report["evaluation"] == json.loads((light / "report.json").read_text())["evaluation"]


@pytest.mark.parametrize(
    "gone",
    [
        "work/jobs/job-00001.safetensors", "work/distilled/views/train-00000-of-00001.parquet",
        "work/random_real/data/train-00000-of-00001.parquet", "work/students/distilled-soft-seed1.json",
        "work/students/distilled-soft-seed0.json", "dataset", "work",
    ],
)  # fmt: skip
def test_missing_files_are_recreated_with_the_same_bytes(light, copied, done, gone):
    path = copied / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    left = {p: t for p, t in mtimes(copied / "work" / "jobs").items() if not p.startswith(str(path))}
    assert go(copied, *LIGHT, teachers=done / "teachers") == 0
    assert sha_tree(copied / "dataset") == sha_tree(light / "dataset")
    assert sha_tree(copied / "control") == sha_tree(light / "control")
    assert sha_tree(copied / "student") == sha_tree(light / "student")
    jobs = {name: sha for name, sha in sha_tree(copied / "work" / "jobs").items() if ".aside-" not in name}
    assert jobs == sha_tree(light / "work" / "jobs")
    assert {p: mtimes(copied)[p] for p in left} == left, "a finished job is not changed"
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (copied, light))
    assert ours["evaluation"] == theirs["evaluation"]


def test_jobs_of_another_recipe_are_not_used(light, done, tmp_path):
    """In a work folder moved under another recipe, the jobs have another fingerprint."""
    shutil.copytree(light / "work" / "jobs", tmp_path / "out" / "work" / "jobs")
    overrides = ("synthesis.lr=0.5",)
    make(tmp_path / "out", done / "teachers", *overrides, wanted=("synthesize",))
    ours, theirs = (sha_tree(folder / "work" / "jobs") for folder in (tmp_path / "out", light))
    assert len(theirs) == 4
    assert all(ours[name] != theirs[name] for name in theirs)


@pytest.mark.parametrize(
    ("stage", "there", "word"),
    [
        ("synthesize", None, "--stage squeeze"), ("relabel", None, "--stage synthesize"),
        ("package", None, "--stage relabel"), ("evaluate", None, "--stage package"),
        ("relabel", "teachers", "--stage synthesize"),
        ("package", "teachers", "--stage relabel"), ("package", "work/jobs", "--stage relabel"),
        ("evaluate", "work/jobs", "--stage package"),
    ],
)  # fmt: skip
def test_a_stage_out_of_order_gives_a_one_line_error(light, done, tmp_path, capsys, stage, there, word):
    if there == "work/jobs":
        shutil.copytree(light / there, tmp_path / "out" / there)
        shutil.copy(light / "recipe.yaml", tmp_path / "out")
    assert go(tmp_path / "out", *LIGHT, "--stage", stage, teachers=done / "teachers" if there else None) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("StageError")]
    assert word in line


# -- init -------------------------------------------------------------------------------------------------------------


def test_each_init_starts_from_its_own_images(done, tmp_path):
    source, images = load_source(tiny().data), {}
    for init in ("noise", "real_index", "real_random"):
        still = (f"synthesis.init={init}", "synthesis.lr=1.0e-9", "synthesis.iterations=1")
        make(tmp_path / init, done / "teachers", *still, wanted=("synthesize",))
        kept = [
            read_tensors(path)["images_uint8"] for path in sorted((tmp_path / init / "work/jobs").glob("*.safetensors"))
        ]
        images[init] = torch.stack(kept, dim=1).flatten(0, 1)
    for init, by_index in (("real_index", True), ("real_random", False)):
        rows = real_rows(source, 2, seed=0, by_index=by_index)
        assert torch.equal(images[init], source.train.images(rows))
    assert not torch.equal(images["real_index"], images["real_random"])
    assert 40 < float(images["noise"].float().std())
    assert len({image.numpy().tobytes() for image in images["noise"]}) == 20


def test_a_small_class_omits_the_control_and_held_out_images_are_named(tmp_path):
    pictures = [random_picture(16, 16, "L", seed=i) for i in range(24)]
    labels = [0] * 2 + [1] * 11 + [2] * 11
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    part = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "source")
    overrides = [
        f"data.source={tmp_path / 'source'}", "data.num_classes=3", "synthesis.ipc=3", "squeeze.batch_size=8",
        "synthesis.batch_size=3", "relabel.batch_size=3", "synthesis.init=noise", "data.validation_fraction=0.25", *LIGHT,
    ]  # fmt: skip
    assert go(tmp_path / "out", *overrides) == 0
    assert not (tmp_path / "out" / "control").exists()
    evaluation = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]
    assert [row["images"] for row in evaluation["rows"]] == ["distilled", "distilled"]
    assert "fewer real training images" in evaluation["left_out"]["random real"]
    card = (tmp_path / "out" / "dataset" / "README.md").read_text()
    assert "Left out: random real" in card
    assert evaluation["tested_on"] == "training images that were held out"
    assert f"{evaluation['test_count']} real training images that were held out" in card
    assert evaluation["test_count"] == 6


# -- processes --------------------------------------------------------------------------------------------------------


def test_two_processes_give_the_same_bytes_as_one(done, tmp_path):
    """With noise init and one teacher left to train, the processes have unequal work and meet only at barriers."""
    overrides = [*LIGHT, "synthesis.init=noise"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert go(one, *overrides, teachers=done / "teachers") == 0
    (trained,) = (p for p in (done / "teachers").iterdir() if p.name.startswith("test_efficientnet"))
    shutil.copytree(trained, two / "teachers" / trained.name)
    words = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--main_process_port", "0", str(ROOT / "recipes" / "prism.py"), str(RECIPE)]
    words += [*TINY, *overrides, "--output", str(two / "out"), "--teachers", str(two / "teachers"), "--threads", "1"]
    done_two = subprocess.run(
        [PYTHON, "-m", "accelerate.commands.launch", *words],
        capture_output=True, text=True, env=quiet_env(), check=False, timeout=300,
    )  # fmt: skip
    assert done_two.returncode == 0, done_two.stderr[-4000:]
    for folder in ("dataset", "control", "work/jobs", "work/students", "student"):
        assert sha_tree(two / "out" / folder) == sha_tree(one / folder), folder
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (two / "out", one))
    assert ours["evaluation"] == theirs["evaluation"]
    assert (ours["hardware"]["processes"], theirs["hardware"]["processes"]) == (2, 1)
    weights = [p.read_bytes() for root in (two, done) for p in (root / "teachers").glob("test_byobnet*/*.safetensors")]
    assert weights[0] == weights[1]


# -- inputs behind a name ---------------------------------------------------------------------------------------------


def gray_folder(folder, *, shift):
    """Write a Parquet folder of four classes; `shift` rotates the labels."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))})
    for split, per_class in (("train", 40), ("test", 4)):
        count = 4 * per_class
        rows = {
            "image": [random_picture(16, 16, "L", seed=i + (1000 if split == "test" else 0)) for i in range(count)],
            "label": [(i + shift) % 4 for i in range(count)],
        }
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return folder


@pytest.mark.parametrize("where", ["same output", "new output"])
def test_changed_data_under_the_same_name_is_detected(tmp_path, capsys, where):
    source = gray_folder(tmp_path / "source", shift=0)
    words = [f"data.source={source}", "data.num_classes=4", "relabel.batch_size=8", "synthesis.batch_size=4", *LIGHT]
    teachers = tmp_path / "teachers"
    assert go(tmp_path / "first", *words, "--stage", "squeeze", teachers=teachers) == 0
    gray_folder(source, shift=1)
    capsys.readouterr()
    folder = tmp_path / ("first" if where == "same output" else "second")
    assert go(folder, *words, "--stage", "squeeze", teachers=teachers) == 2
    error = capsys.readouterr().err
    assert ("have changed" if where == "same output" else "trained on other images") in error


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluation.student=vit_tiny_patch16_224", "cannot take 1 x 16 x 16 images"),
        ("teachers.bn_pool=[squeeze:vit_tiny_patch16_224]", "cannot take 3 x 16 x 16 images"),
        ("teachers.verifier=squeeze:dpn48b", "no linear classifier"),
    ],
)
def test_an_unsuitable_network_fails_before_any_work(tmp_path, capsys, override, words):
    assert go(tmp_path / "run", override) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_verifier_under_another_name_is_detected(done, tmp_path, capsys):
    twin = next((done / "teachers").glob("test_byobnet-*"))
    assert go(tmp_path / "run", f"teachers.verifier=local-dir:{twin}") == 2
    assert "has the architecture of teacher 'squeeze:test_byobnet'" in capsys.readouterr().err


def test_packaging_the_same_again_keeps_the_scores_in_the_card(copied, done):
    """`--stage package --push-to-hub` on an evaluated run must not publish a card that says *not yet run*."""
    card = (copied / "dataset" / "README.md").read_text()
    assert "Not yet run" not in card
    assert go(copied, *LIGHT, "--stage", "package", teachers=done / "teachers") == 0
    assert (copied / "dataset" / "README.md").read_text() == card


def test_scores_are_dropped_without_the_hashes_of_the_tables(copied, done):
    (copied / "dataset" / "provenance.json").unlink()
    assert go(copied, *LIGHT, "--stage", "package", teachers=done / "teachers") == 0
    assert "Not yet run" in (copied / "dataset" / "README.md").read_text()


def test_packaging_other_tables_drops_the_scores(copied, done):
    provenance = copied / "dataset" / "provenance.json"
    value = json.loads(provenance.read_text())
    value["files"]["data/train-00000-of-00001.parquet"]["sha256"] = "0" * 64
    provenance.write_text(json.dumps(value))
    assert go(copied, *LIGHT, "--stage", "package", teachers=done / "teachers") == 0
    assert "Not yet run" in (copied / "dataset" / "README.md").read_text()
