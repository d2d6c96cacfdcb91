import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from each import each
from pipeline import mtimes, one_line, save_timm, tiny
from transformers import AutoImageProcessor, AutoModelForImageClassification

from prism_hf.errors import RecipeError, TeacherError
from prism_hf.images.pixels import to_reference
from prism_hf.images.source import load_source
from prism_hf.models import squeeze as squeezing
from prism_hf.models.load import load_teacher
from prism_hf.models.squeeze import is_squeezed, squeeze_teacher, teacher_folder
from prism_hf.models.teacher import fit_teacher
from prism_hf.run.preflight import check_architectures
from prism_hf.runtime.seeds import derived_seed

CPU, NAME = torch.device("cpu"), "squeeze:test_efficientnet"
FAST = ("data.size=8", "squeeze.batch_size=256")


def train(root, *overrides, name=NAME):
    recipe = tiny(*FAST, *overrides)
    report = squeeze_teacher(name, recipe, load_source(recipe.data), root, device=CPU)
    return recipe, teacher_folder(name, recipe, root), report


def load_squeezed(name, recipe, root, *, device):
    return load_teacher(name, device=device, squeezed={name: teacher_folder(name, recipe, root)})


def weights(root, *overrides):
    recipe, _, _ = train(root, *overrides)
    return load_squeezed(NAME, recipe, root, device=CPU).weights_sha256


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("squeezed"))


def test_the_folder_names_its_training_data(squeezed):
    recipe, folder, report = squeezed
    assert is_squeezed(folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name], "no draft is left"
    assert json.loads((folder / "squeeze.json").read_text()) == report.plain()
    report = report.plain()
    assert report["kind"] == "teacher"
    assert report["teacher"] == NAME
    assert report["architecture"] == "test_efficientnet"
    assert (report["train_count"], report["test_count"], report["channels"]) == (1347, 450, 1)
    assert report["source"] == {"id": "digits", "on_hub": False, "revision": None, "license": recipe.data.license}
    assert report["test"] == {"id": "digits", "split": "test"}
    assert report["settings"] == {"seed": 0, "data": "digits", "steps": 5, "epochs": 1}
    assert report["wall_time_s"] > 0
    assert 0 <= report["test_top1"] <= 1
    assert folder.name == f"test_efficientnet-{report['fingerprint']}"
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == list("0123456789")
    assert config["pretrained_cfg"]["license"] == recipe.data.license
    assert "num_classes" not in config.get("model_args", {})
    assert str(folder.parent) not in (folder / "squeeze.json").read_text() + (folder / "config.json").read_text()


def test_a_local_source_is_recorded_without_its_path(tmp_path):
    """The path must stay private, because the folder may be shared."""
    recipe = tiny(*FAST)
    data = load_source(recipe.data)
    private = tiny(*FAST, "data.source=/home/someone/pictures")
    report = squeeze_teacher(NAME, private, data, tmp_path, device=CPU)
    assert report.source.id == report.settings.data == report.test.id == "pictures"
    assert "someone" not in "".join(p.read_text() for p in teacher_folder(NAME, private, tmp_path).glob("*.json"))


def test_a_teacher_of_an_older_version_still_loads(squeezed, tmp_path):
    recipe, folder, facts = squeezed
    report = facts.plain()
    old = Path(shutil.copytree(folder, tmp_path / folder.name))
    kept = ("teacher", "fingerprint", "train_content", "test_top1", "wall_time_s")
    settings = {key: report["settings"][key] for key in ("seed", "data", "steps")}
    older = {key: report[key] for key in kept} | {"settings": settings}
    (old / "squeeze.json").write_text(json.dumps(older))
    assert train(tmp_path)[2].plain() == older
    assert load_squeezed(NAME, recipe, tmp_path, device=CPU).num_classes == 10


def test_timm_transformers_and_prism_give_equal_logits(squeezed):
    recipe, folder, _ = squeezed
    teacher = load_squeezed(NAME, recipe, folder.parent, device=CPU)
    fit_teacher(teacher, class_names=[str(n) for n in range(10)], channels=1)
    assert teacher.label_names == tuple("0123456789")
    assert teacher.size == 8
    gray = load_source(recipe.data).test.images(range(5))
    x = teacher.prepare(to_reference(gray))
    ours = teacher.model(x)
    timms = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transformers = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(timms(x), ours, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(transformers(pixel_values=x).logits, ours, rtol=1e-5, atol=1e-5)
    assert [transformers.config.id2label[i] for i in range(10)] == list("0123456789")
    processor = AutoImageProcessor.from_pretrained(folder)
    rgb = gray.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    shown = processor([picture for picture in rgb], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(shown, x.contiguous(), rtol=1e-3, atol=1e-2)


def test_the_stored_teacher_has_the_reported_score(squeezed):
    recipe, folder, report = squeezed
    teacher, test = load_squeezed(NAME, recipe, folder.parent, device=CPU), load_source(recipe.data).test
    with torch.no_grad():
        guesses = teacher.logits(to_reference(test.images(range(len(test))))).argmax(1)
    assert float((guesses == torch.from_numpy(test.labels)).double().mean()) == pytest.approx(report.test_top1)


def test_a_finished_teacher_is_not_changed(squeezed):
    _, folder, report = squeezed
    before = mtimes(folder)
    assert train(folder.parent)[2] == report
    assert mtimes(folder) == before


def test_a_half_written_folder_does_not_count_as_finished(squeezed, tmp_path):
    _, folder, _ = squeezed
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert not is_squeezed(tmp_path)
    assert not is_squeezed(tmp_path / "nothing")


def test_a_half_written_folder_is_trained_again(tmp_path):
    recipe = tiny(*FAST)
    folder = teacher_folder(NAME, recipe, tmp_path)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert is_squeezed(train(tmp_path)[1])


def test_equal_seeds_give_equal_weights_without_changing_global_state(squeezed, tmp_path):
    recipe, folder, _ = squeezed
    state = torch.get_rng_state()
    train(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    one, two = (load_squeezed(NAME, recipe, root, device=CPU) for root in (folder.parent, tmp_path))
    assert one.weights_sha256 == two.weights_sha256


@pytest.mark.parametrize(
    "override",
    [
        "squeeze.epochs=2", "squeeze.batch_size=255", "squeeze.lr=0.004", "squeeze.weight_decay=0.5",
        "squeeze.crop_scale=[0.5,1.0]", "squeeze.crop_scale=[0.6,0.9]", "squeeze.flip=true", "squeeze.noise_std=0.2",
        "squeeze.noise_std=0", "squeeze.bn_statistics=clean", "seed=1",
    ],
)  # fmt: skip
def test_each_setting_changes_folder_and_weights(squeezed, tmp_path, override):
    recipe, folder, _ = squeezed
    assert teacher_folder(NAME, tiny(*FAST, override), folder.parent) != folder
    assert weights(tmp_path, override) != load_squeezed(NAME, recipe, folder.parent, device=CPU).weights_sha256


@each("name", [NAME, "squeeze:test_resnet"])
def test_clean_statistics_are_averages_over_views_without_noise(tmp_path, name):
    """Nothing but the running statistics changes, and they equal those of a literal pass over the same views."""
    loud = (*FAST, "squeeze.noise_std=0.5")
    plain, clean = (train(tmp_path, *loud, f"squeeze.bn_statistics={kind}", name=name) for kind in ("running", "clean"))
    assert plain[1] != clean[1]
    one, two = (load_squeezed(name, made[0], tmp_path, device=CPU) for made in (plain, clean))
    before, after = one.model.state_dict(), two.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    norms = {key for key in before if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert changed <= norms
    assert {key for key in norms if key.endswith(("_mean", "_var"))} <= changed
    # Literal: a hook on each batch norm, on one epoch of views that differ from training only in the noise.
    seed = derived_seed(0, "squeeze", name.removeprefix("squeeze:"))
    quiet = dataclasses.replace(clean[0].squeeze, noise_std=0.0)
    fitted = fit_teacher(two, class_names=[str(n) for n in range(10)], channels=1)
    batches = [images for images, _ in squeezing._batches(load_source(clean[0].data).train, quiet, seed, fitted)]
    seen = {key: [] for key, module in one.model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    for key, module in one.model.named_modules():
        if key in seen:
            module.train()
            module.register_forward_pre_hook(lambda _, inputs, key=key: seen[key].append(inputs[0].double()))
    with torch.no_grad():
        for images in batches:
            one.model(images)
    for key, inputs in seen.items():
        means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
        torch.testing.assert_close(after[f"{key}.running_mean"].double(), means, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(after[f"{key}.running_var"].double(), variances, rtol=1e-3, atol=1e-4)
    momenta = [{m.momentum for m in x.model.modules() if isinstance(m, torch.nn.BatchNorm2d)} for x in (one, two)]
    assert momenta[0] == momenta[1]
    first = next(iter(seen))
    assert before[f"{first}.running_var"].mean() > 1.02 * after[f"{first}.running_var"].mean(), "without the noise"


@pytest.mark.parametrize("override", ["synthesis.lr=0.5", "relabel.epochs=3", "name=other", "evaluation.seeds=[9]"])
def test_recipes_with_the_same_training_share_teachers(squeezed, override):
    _, folder, _ = squeezed
    assert teacher_folder(NAME, tiny(*FAST, override), folder.parent) == folder


def test_recipes_with_the_same_squeeze_seed_share_teachers(squeezed, tmp_path):
    _, folder, report = squeezed
    before = mtimes(folder)
    for seed in (0, 1, 2):
        _, found, again = train(folder.parent, f"seed={seed}", "squeeze.seed=0")
        assert found == folder, "also the folder of the recipe with seed 0 and no squeeze seed"
        assert again == report
    assert mtimes(folder) == before
    others = {
        teacher_folder(NAME, tiny(*FAST, f"seed={a}", f"squeeze.seed={b}"), tmp_path).name for a in (0, 1) for b in (1, 2)
    }
    assert len(others) == 2
    assert folder.name not in others
    assert teacher_folder(NAME, tiny(*FAST, "seed=1"), tmp_path).name in others


def test_the_squeeze_seed_is_used(tmp_path):
    _, _, report = train(tmp_path / "own", "seed=0", "squeeze.seed=1")
    assert report.settings.seed == 1
    assert weights(tmp_path / "own", "seed=0", "squeeze.seed=1") == weights(tmp_path / "recipe", "seed=1")


def test_unknown_architectures_and_large_batches_give_a_one_line_error(tmp_path):
    with pytest.raises(TeacherError) as error:
        check_architectures(tiny("teachers.logit=squeeze:nonsense_net"))
    assert "nonsense_net" in one_line(error)
    with pytest.raises(TeacherError) as error:
        train(tmp_path, "squeeze.batch_size=2000")
    assert "1347" in one_line(error)
    assert not any(tmp_path.iterdir())


# -- pretrained starts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    facts = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 24, 24], "license": "mit"}
    return save_timm(tmp_path_factory.mktemp("start") / "net", "test_byobnet", classes=7, **facts)


def test_a_teacher_can_start_from_pretrained_weights(start, tmp_path):
    name = f"squeeze:local-dir:{start}"
    recipe, folder, report = train(
        tmp_path, "squeeze.lr=1e-12", "squeeze.weight_decay=0", f"teachers.logit={name}", name=name
    )
    teacher = load_teacher(name, device=CPU, squeezed={name: folder})
    before, after = timm.create_model(f"local-dir:{start}", pretrained=True).state_dict(), teacher.model.state_dict()
    kept = [key for key in before if not key.startswith("head.") and "running" not in key and "num_batches" not in key]
    assert len(kept) > 10
    for key in kept:
        torch.testing.assert_close(after[key], before[key], rtol=1e-4, atol=1e-6)
    assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), "the input of the start is kept"
    assert (teacher.size, teacher.num_classes, teacher.architecture) == (8, 10, "test_byobnet")
    assert folder.name.startswith("net-")
    assert report.start.name == "local-dir:net", "the path stays private"
    assert report.start.license == "mit"
    assert report.start.weights_sha256 == load_teacher(f"local-dir:{start}", device=CPU).weights_sha256
    assert teacher.license == f"{recipe.data.license} (data) and mit (weights of local-dir:net)"
    assert str(start.parent) not in "".join(path.read_text() for path in folder.glob("*.json"))
    fit_teacher(teacher, class_names=[str(n) for n in range(10)], channels=1)


def test_the_score_of_a_fine_tuned_teacher_is_that_of_the_stored_one(start, tmp_path):
    name = f"squeeze:local-dir:{start}"
    recipe, folder, report = train(
        tmp_path, "squeeze.input_size=own", "squeeze.epochs=2", f"teachers.logit={name}", name=name
    )
    teacher = load_teacher(name, device=CPU, squeezed={name: folder})
    assert teacher.size == 24
    test = load_source(recipe.data).test
    answers = teacher.logits(to_reference(test.images(range(len(test))))).argmax(1)
    assert float((answers == torch.from_numpy(test.labels)).float().mean()) == pytest.approx(report.test_top1, abs=0.003)


@pytest.mark.parametrize(("name", "words"), [
    ("squeeze:nonsense.a1_in1k", "timm has no such architecture"),
    ("squeeze:resnet18.nonsense", "timm has no weights with that name"),
    ("squeeze:local-dir:/no/such/folder", "config.json"),
])  # fmt: skip
def test_a_start_that_cannot_be_loaded_is_refused_before_training(name, words):
    with pytest.raises(TeacherError) as error:
        check_architectures(tiny(*FAST, f"teachers.logit={name}"))
    assert words in one_line(error)


def test_a_transformers_start_is_refused():
    with pytest.raises(RecipeError, match="is not squeeze:ARCHITECTURE, or squeeze: and a pretrained timm name"):
        tiny("teachers.logit=squeeze:transformers:org/name")
