import copy
import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from prism_hf.dataset.writer import ImageRows, build_dataset
from prism_hf.errors import TeacherError
from prism_hf.images.pixels import to_reference
from prism_hf.images.views import from_columns
from prism_hf.method.relabel import ask_teachers, combine_logits, relabel_epoch


def literal(logits, rule, weights=None):
    if rule == "weighted":
        return sum(w * part for w, part in zip(weights, logits, strict=True)) / sum(weights)
    if rule == "norm_balanced_mean":
        norms = [float((part**2).sum()) ** 0.5 for part in logits]
        logits = [part * (sum(norms) / len(norms)) / norm for part, norm in zip(logits, norms, strict=True)]
    return sum(logits) / len(logits)


@pytest.mark.parametrize("rule", ["mean", "norm_balanced_mean", "weighted"])
@pytest.mark.parametrize("teachers", [1, 3])
def test_combining_equals_the_formula(rule, teachers):
    scale = torch.tensor([1.0, 10.0, 0.3])[:teachers].view(-1, 1, 1)
    logits = torch.randn(teachers, 5, 4, dtype=torch.float64) * scale
    weights = [0.2, 3.0, 1.0][:teachers] if rule == "weighted" else None
    ours = combine_logits(logits, rule, weights)
    torch.testing.assert_close(ours, literal(list(logits), rule, weights))


def test_balanced_teachers_have_equal_influence():
    loud, quiet = torch.randn(5, 4), torch.randn(5, 4)
    a = combine_logits(torch.stack([loud * 100, quiet]), "norm_balanced_mean")
    b = combine_logits(torch.stack([loud, quiet]), "norm_balanced_mean")
    torch.testing.assert_close(a / a.norm(), b / b.norm())


def test_an_unknown_rule_raises_an_error():
    with pytest.raises(ValueError, match="unknown ensemble rule 'median'"):
        combine_logits(torch.ones(1, 2, 2), "median")


def test_an_all_zero_teacher_cannot_be_balanced(tiny_recipe, tiny_teachers, tiny_images):
    """The norm is not checked at once, because that would wait for the device."""
    logits = combine_logits(torch.stack([torch.ones(2, 3), torch.zeros(2, 3)]), "norm_balanced_mean")
    assert bool(logits.isnan().all())
    settings = tiny_recipe({"data.num_classes": 7}).relabel
    teacher = tiny_teachers[settings.teachers[0]]
    silent = dataclasses.replace(teacher, model=nn.Sequential(teacher.model, Zero()))
    with pytest.raises(TeacherError, match="are all zero.*use ensemble mean"):
        ask_teachers(to_reference(tiny_images), [teacher, silent], settings)


class Zero(nn.Module):
    def forward(self, x):
        return x * 0


@pytest.fixture(scope="module")
def label(tiny_recipe, tiny_teachers, tiny_images):
    def run(changes=None, *, epoch=0, seed=0):
        settings = tiny_recipe({"data.num_classes": 7} | (changes or {})).relabel
        return relabel_epoch(epoch, tiny_images, [tiny_teachers[n] for n in settings.teachers], settings, seed=seed)

    return run


VIEW_COLUMNS = {"crop", "flip", "mix_image_index", "mix_box", "mix_weight", "image_index"}


def changed(a, b):
    return {key for key in a if not np.array_equal(a[key], b[key])}


@pytest.mark.parametrize(
    ("change", "must", "may_not"),
    [
        ({"relabel.teachers": ["test_resnet"]}, {"teacher_logits"}, VIEW_COLUMNS),
        ({"relabel.ensemble": "mean"}, {"teacher_logits"}, VIEW_COLUMNS),
        ({"relabel.ensemble": "weighted", "relabel.weights": [1.0, 9.0]}, {"teacher_logits"}, VIEW_COLUMNS),
        ({"relabel.batch_size": 2}, {"batch", "teacher_logits"}, set()),
        (
            {"relabel.view.crop_scale": [0.9, 1.0]},
            {"crop", "teacher_logits"},
            {"image_index", "flip", "mix_box"},
        ),
        (
            {"relabel.view.crop_scale": [0.25, 0.3]},
            {"crop", "teacher_logits"},
            {"image_index", "flip", "mix_box"},
        ),
        ({"relabel.view.flip": False}, {"flip", "teacher_logits"}, {"image_index"}),
        ({"relabel.view.mix": "mixup"}, {"mix_box", "mix_weight", "teacher_logits"}, set()),
        ({"relabel.view.mix": "none"}, {"mix_image_index", "mix_box", "mix_weight", "teacher_logits"}, set()),
        ({"relabel.view.mix_alpha": 9.0}, {"mix_box", "mix_weight", "teacher_logits"}, {"crop"}),
    ],
    ids=lambda c: next(iter(c)) if isinstance(c, dict) else "",
)
def test_every_setting_changes_only_what_it_should(label, change, must, may_not):
    base, other = label(), label(change)
    # Later batches may differ in all columns, because the stream of random numbers has shifted.
    first = base["batch"] == 0
    assert must <= changed(base, other)
    assert not may_not & changed(*({key: column[first] for key, column in columns.items()} for columns in (base, other)))


def test_weights_matter_and_are_divided_by_their_sum(label):
    def weighted(*weights):
        return label({"relabel.ensemble": "weighted", "relabel.weights": weights})["teacher_logits"]

    assert np.array_equal(weighted(1.0, 3.0), weighted(2.0, 6.0))
    assert not np.array_equal(weighted(1.0, 3.0), weighted(3.0, 1.0))
    np.testing.assert_array_equal(weighted(1.0, 1.0), label({"relabel.ensemble": "mean"})["teacher_logits"])


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7])
def test_an_epoch_shows_every_image_once(label, size):
    columns = label({"relabel.batch_size": size})
    assert sorted(columns["image_index"].tolist()) == list(range(7))
    counts = np.bincount(columns["batch"])
    assert counts.min() >= 2
    assert counts.max() <= size + 1
    assert (np.diff(columns["batch"]) >= 0).all()
    assert {len(column) for column in columns.values()} == {7}
    partners = {(b, i) for b, i in zip(columns["batch"], columns["mix_image_index"], strict=True)}
    assert partners == {(b, i) for b, i in zip(columns["batch"], columns["image_index"], strict=True)}


def test_epochs_and_seeds_differ_and_repeat(label):
    assert changed(label(), label()) == set()
    assert {"image_index", "crop", "teacher_logits"} <= changed(label(), label(epoch=1))
    assert {"image_index", "crop", "teacher_logits"} <= changed(label(), label(seed=1))
    assert label(epoch=3)["epoch"].tolist() == [3] * 7


def test_columns_have_the_documented_types(label):
    kinds = {key: column.dtype.name for key, column in label().items()}
    assert kinds["epoch"] == kinds["batch"] == kinds["image_index"] == "int32"
    assert kinds["teacher_logits"] == "float16"
    assert label()["teacher_logits"].shape == (7, 3)


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
@pytest.mark.parametrize("ensemble", ["mean", "norm_balanced_mean"])
def test_labels_are_the_teachers_logits_of_the_replayed_view(label, tiny_teachers, tiny_images, mix, ensemble):
    columns = label({"relabel.view.mix": mix, "relabel.ensemble": ensemble, "relabel.batch_size": 3})
    for number in range(2):
        batch = {key: column[columns["batch"] == number] for key, column in columns.items()}
        shown = from_columns(batch).replay(to_reference(tiny_images))
        with torch.no_grad():
            logits = [tiny_teachers[name].logits(shown) for name in ("test_resnet", "test_byobnet")]
        expected = literal(logits, ensemble).half()
        torch.testing.assert_close(torch.from_numpy(batch["teacher_logits"]), expected, rtol=2e-3, atol=1e-3)


def test_a_batch_gets_the_combined_logits_in_its_order(tiny_recipe, tiny_teachers, tiny_images):
    settings = tiny_recipe().relabel
    teachers = [tiny_teachers[n] for n in settings.teachers]
    images = to_reference(tiny_images)
    for part in (images[:3], images[3:]):
        labels = ask_teachers(part, teachers, settings)
        assert labels.shape == (len(part), 3)
        assert labels.dtype == torch.float16
        with torch.no_grad():
            expected = literal([t.logits(part) for t in teachers], "norm_balanced_mean")
        torch.testing.assert_close(labels, expected.half(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("factor", [1e9, float("nan")])
def test_the_error_for_logits_beyond_float16_names_the_teacher(tiny_recipe, tiny_teachers, tiny_images, factor):
    teacher = tiny_teachers["test_resnet"]
    loud = dataclasses.replace(teacher, name="loud", model=copy.deepcopy(teacher.model))
    loud.model.fc.weight.mul_(factor)
    settings = tiny_recipe({"relabel.teachers": ["loud"], "relabel.ensemble": "mean"}).relabel
    with pytest.raises(TeacherError, match="teachers loud return logits that exceed float16"):
        ask_teachers(to_reference(tiny_images), [loud], settings)


@pytest.mark.parametrize("epochs", [1, 3])
def test_epochs_is_the_number_of_views_per_image(tiny_recipe, label, tmp_path, epochs):
    made = tiny_recipe({"relabel.epochs": epochs})
    rows = ImageRows([b"x"] * 7, *(torch.zeros(7, dtype=torch.int64) for _ in range(3)), torch.zeros(7, 3).half())
    labeled = [label(epoch=number) for number in range(made.relabel.epochs)]
    build_dataset(tmp_path, rows, labeled, recipe=made, class_names=["a", "b", "c"])
    views = pq.read_table(tmp_path / "views")
    assert views.num_rows == 7 * epochs
    assert set(views["epoch"].to_pylist()) == set(range(epochs))
