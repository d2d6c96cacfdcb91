import dataclasses
import json
import logging

import datasets
import pytest
import torch
from each import each
from PIL import Image
from pipeline import add_card, small_set

from prism_hf.dataset import reader as reading
from prism_hf.dataset import writer
from prism_hf.dataset.reader import DistilledDataset
from prism_hf.errors import DataError, StoppedError
from prism_hf.evaluation import students
from prism_hf.evaluation.scores import student_tasks
from prism_hf.evaluation.students import ROWS, keep_student, label_bytes, label_order, train_on_real, train_student
from prism_hf.images.pixels import to_reference
from prism_hf.images.source import ImageSplit
from prism_hf.images.views import apply_views, from_columns
from prism_hf.method.relabel import ask_teachers, relabel_epoch
from prism_hf.method.soft_labels import class_shares
from prism_hf.models.build import build_network
from prism_hf.models.facts import ScoredOn, SourceFacts
from prism_hf.recipe.plan import batch_ranges
from prism_hf.runtime.checkpoint import Checkpoint
from prism_hf.runtime.store import Artifact

CPU = torch.device("cpu")


def settings_of(tiny_recipe, changes=None):
    return tiny_recipe({f"evaluation.{key}": value for key, value in (changes or {}).items()}).evaluation


@pytest.fixture(scope="module")
def toy(tiny_recipe, tiny_teachers, tiny_images):
    """A distilled dataset in memory: seven images, two epochs of labeled views."""
    settings = tiny_recipe().relabel
    teachers = [tiny_teachers[name] for name in settings.teachers]
    epochs = [relabel_epoch(number, tiny_images, teachers, settings, seed=0) for number in range(2)]

    def views(epoch, rows):
        part = slice(rows.start, rows.stop)
        return from_columns(epochs[epoch])[part], torch.from_numpy(epochs[epoch]["teacher_logits"])[part]

    return DistilledDataset(
        images_uint8=tiny_images,
        labels=torch.tensor([0, 0, 1, 1, 2, 2, 2]),
        class_names=("a", "b", "c"),
        teacher_logits=ask_teachers(to_reference(tiny_images), teachers, settings),
        num_epochs=2,
        views=views,
        image_bytes=1,
        label_bytes=1,
        recipe=None,
        content="toy",
    )


@pytest.fixture(scope="module")
def split(tiny_images):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in tiny_images]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 0, 1, 1, 2, 2, 2]}, features=features)
    return ImageSplit(rows, image_column="image", label_column="label", size=32, channels=3, name="train")


@pytest.fixture(scope="module")
def student(tiny_recipe, toy):
    def train(changes=None, *, labels="soft", seed=0, source=toy):
        network = train_student(source, settings_of(tiny_recipe, changes), labels=labels, seed=seed, device=CPU)
        return {key: value.clone() for key, value in network.state_dict().items()}

    return train


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def base(student):
    return student()


def batches_of_whole_epochs(source, epochs, batch_size, recorded=None):
    """Compute the batches of a student directly: all images as floats, whole epochs of views."""
    images = to_reference(source.images_uint8)
    for epoch in range(epochs):
        rows, logits = source.epoch(epoch % recorded if recorded else epoch)
        for part in batch_ranges(len(logits), batch_size):
            cut = rows[part.start : part.stop]
            own = source.labels[cut.image_index]
            partner = source.labels[cut.view.mix_with.clamp(min=0)]
            shares = class_shares(own, partner, cut.view.mix_weight, len(source.class_names))
            shown = apply_views(images[cut.image_index], cut.view, images[cut.view.mix_with.clamp(min=0)], cut.partner)
            yield shown, logits[part.start : part.stop].float(), shares


def same_batches(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert [t.dtype for t in a] == [t.dtype for t in b]
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=["cutmix", "mixup", "none"])
def packed(request, tmp_path, monkeypatch):
    """A dataset of 21 images and four epochs, read from its tables and from files."""
    recipe, names, *_ = small_set(tmp_path, channels=3, size=16, classes=3, ipc=7, epochs=4, mix=request.param)
    add_card(tmp_path, recipe, names)
    monkeypatch.setattr(reading, "_IN_MEMORY", 0)
    return reading.load_distilled(tmp_path)


def watched(source, read):
    """Return the same dataset, with a list that records the requested views."""
    return dataclasses.replace(source, views=lambda epoch, rows: read.append((epoch, rows)) or source.views(epoch, rows))


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory):
    """Like `packed`, for tests that train on it."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SMALLEST_GROUP", 1)
        recipe, names, *_ = small_set(folder, channels=3, size=32, classes=3, ipc=7, epochs=4)
    add_card(folder, recipe, names)
    return reading.load_distilled(folder)


def view_batches(source, epochs, batch_size, *, start=0, recorded=None, per_image=False):
    order = [epoch % (recorded or epochs) for epoch in range(epochs)]
    for views, shares, logits in students._view_batches(source, order, batch_size, CPU, start, per_image=per_image, seed=0):
        yield views, logits, shares


@pytest.mark.parametrize("batch_size", [4, 5, 21, 100])  # 21 = 4 * 5 + 1: the last image joins the previous batch
def test_batches_equal_parts_of_whole_epochs(packed, monkeypatch, batch_size):
    same_batches(view_batches(packed, 3, batch_size), batches_of_whole_epochs(packed, 3, batch_size))
    monkeypatch.setattr(students, "_ON_DEVICE", 0)
    same_batches(view_batches(packed, 3, batch_size), batches_of_whole_epochs(packed, 3, batch_size))


@each("start", [0, 1, 3, 4, 5, 9, 12, 13])
def test_batches_can_start_anywhere(packed, start):
    expected = list(batches_of_whole_epochs(packed, 3, 6))
    assert len(expected) == 12
    same_batches(view_batches(packed, 3, 6, start=start), expected[start:])


def test_skipped_batches_are_not_read(packed, monkeypatch):
    prepared, read = [], []
    monkeypatch.setattr(students, "to_reference", lambda images: prepared.append(len(images)) or to_reference(images))
    next(view_batches(watched(packed, read), 4, 6, start=9))
    assert prepared == [6, 6], "the images of one batch and their mix partners"
    assert read == [(2, range(6, 12))]


@pytest.mark.parametrize("recorded", [1, 3, 4])
def test_recorded_epochs_are_repeated_in_order_from_any_start(packed, recorded):
    expected = list(batches_of_whole_epochs(packed, 4, 6, recorded))
    assert len(expected) == 16
    for start in (0, 3, 4, 7, 8, 11, 15, 16):
        same_batches(view_batches(packed, 4, 6, start=start, recorded=recorded), expected[start:])


def test_views_of_other_epochs_are_not_read(packed):
    read = []
    list(view_batches(watched(packed, read), 5, 6, recorded=2))
    assert {epoch for epoch, _ in read} == {0, 1}
    assert max(rows.stop for _, rows in read) == 21


def test_image_labels_are_mixed_like_their_view(packed):
    ours = view_batches(packed, 3, 5, recorded=2, per_image=True)
    theirs = list(batches_of_whole_epochs(packed, 3, 5, 2))
    for number, (batch, (shown, _, shares)) in enumerate(zip(ours, theirs, strict=True)):
        part = batch_ranges(21, 5)[number % 4]
        rows, _ = packed.views(number // 4 % 2, part)
        for row in range(len(part)):
            own, partner = int(rows.image_index[row]), int(rows.view.mix_with[row])
            weight, logits = float(rows.view.mix_weight[row]), packed.teacher_logits.double()
            expected = logits[own] if partner < 0 else weight * logits[own] + (1 - weight) * logits[partner]
            torch.testing.assert_close(batch[1][row].double(), expected, rtol=1e-6, atol=1e-6)
        assert batch[1].dtype == torch.float32
        assert torch.equal(batch[0], shown)
        assert torch.equal(batch[2], shares)


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "kl"},
        {"ce_weight": 1.0},
        {"lr": 0.001},
        {"weight_decay": 0.5},
        {"ema": 0.9},
        {"epochs": 1},
        {"label_epochs": 1},
        {"loss": "dist"},
        {"loss": "cosine"},
        {"batch_size": 2},
        {"student": "test_byobnet"},
        {"micro_batch": 2},
        {"optimizer": "adam"},
        {"optimizer": "muon"},
        {"cosine_stretch": 2.0},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_setting_changes_the_student(student, base, change):
    assert not same(base, student(change))


def test_temperature_changes_a_kl_student(student):
    assert not same(student({"loss": "kl"}), student({"loss": "kl", "temperature": 1.0}))


def test_only_another_seed_gives_another_student(student, base):
    assert same(base, student(seed=0))
    assert not same(base, student(seed=1))


def test_a_null_number_of_epochs_uses_all_epochs(student, base):
    assert same(base, student({"epochs": 2}))


def test_training_neither_changes_global_randomness_nor_depends_on_it(student, base):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert same(base, student())
    assert torch.equal(torch.get_rng_state(), before)


def other_logits(toy):
    def views(epoch, rows):
        part, logits = toy.views(epoch, rows)
        return part, logits.flip(1) * 3

    return dataclasses.replace(toy, views=views)


def test_hard_labels_ignore_the_teachers_logits_and_soft_ones_do_not(student, base, toy):
    changed = other_logits(toy)
    hard = student(labels="hard")
    assert same(hard, student(labels="hard", source=changed))
    assert not same(base, student(source=changed))
    assert not same(base, hard)


def test_hard_labels_use_the_classes(student, toy):
    relabeled = dataclasses.replace(toy, labels=toy.labels.flip(0))
    assert not same(student(labels="hard"), student(labels="hard", source=relabeled))


def test_student_learns_the_images(tiny_recipe, toy):
    # After many passes over the same two epochs of views, the student must agree with the stored logits.
    again = dataclasses.replace(toy, num_epochs=60, views=lambda epoch, rows: toy.views(epoch % 2, rows))
    settings = dataclasses.replace(settings_of(tiny_recipe), epochs=None)
    network = train_student(again, settings, labels="soft", seed=0, device=CPU)
    rows, logits = toy.epoch(0)
    with torch.no_grad():
        answer = network(rows.replay((toy.images_uint8 / 255 - 0.449) / 0.226))
    assert not network.training
    assert answer.shape == (7, 3)
    assert float((answer - logits).square().mean()) < 0.5 * float(logits.float().var(0).mean())


def test_more_epochs_than_the_folder_contains_raise_an_error(tiny_recipe, toy):
    settings = tiny_recipe({"relabel.epochs": 9, "evaluation.epochs": 3}).evaluation
    with pytest.raises(DataError, match="has 2 epochs of views, evaluation.epochs is 3"):
        train_student(toy, settings, labels="soft", seed=0, device=CPU)


def test_fewer_label_epochs_are_repeated(student, base, toy):
    """Two epochs of training with one recorded epoch equal training on a dataset that contains this epoch twice."""
    twice = dataclasses.replace(toy, views=lambda _, rows: toy.views(0, rows))
    assert same(student({"label_epochs": 1}), student(source=twice))
    assert same(base, student({"label_epochs": 2}))
    once = dataclasses.replace(toy, num_epochs=1)
    assert same(student({"label_epochs": 1, "epochs": 2}), student({"label_epochs": 1, "epochs": 2}, source=once))


def test_more_label_epochs_than_the_folder_contains_raise_an_error(tiny_recipe, toy):
    settings = tiny_recipe({"relabel.epochs": 9, "evaluation.label_epochs": 3, "evaluation.epochs": 50}).evaluation
    with pytest.raises(DataError, match="has 2 epochs of views, evaluation.label_epochs is 3"):
        train_student(toy, settings, labels="soft", seed=0, device=CPU)


def order_of(source, **changes):
    settings = dataclasses.replace(source.recipe.evaluation, epochs=None, **changes)
    return label_order(source, settings, 0)


def pruned(source, stored, epochs):
    relabel = dataclasses.replace(source.recipe.relabel, epochs=epochs, stored_epochs=stored)
    return dataclasses.replace(source, num_epochs=stored, recipe=dataclasses.replace(source.recipe, relabel=relabel))


def test_stored_epochs_are_used_again_in_an_order_of_the_seed(packed_once):
    source = pruned(packed_once, 4, 18)
    order = order_of(source)
    assert order[:4] == [0, 1, 2, 3]
    turns = [order[start : start + 4] for start in range(0, 16, 4)]
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert len(order) == 18
    assert order == order_of(source)
    others = [label_order(source, dataclasses.replace(source.recipe.evaluation, epochs=None), seed) for seed in range(4)]
    assert len({tuple(each) for each in others}) > 1
    assert order_of(packed_once) == [0, 1, 2, 3]


def test_views_that_are_used_again_are_mirrored_by_chance(packed_once):
    def shown(order, flip):
        view = dataclasses.replace(packed_once.recipe.relabel.view, flip=flip)
        relabel = dataclasses.replace(packed_once.recipe.relabel, view=view)
        source = dataclasses.replace(packed_once, recipe=dataclasses.replace(packed_once.recipe, relabel=relabel))
        batches = students._view_batches(source, order, 7, CPU, 0, per_image=False, seed=0)
        return torch.cat([views for views, *_ in batches]).split(21)

    first, again = shown([0, 0], flip=True)
    assert torch.equal(first, shown([0, 1], flip=True)[0])
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(first, again, strict=True)]
    same_as_before = [torch.equal(a, b) for a, b in zip(first, again, strict=True)]
    assert all(a != b for a, b in zip(flipped, same_as_before, strict=True))
    assert 3 < sum(flipped) < 18
    assert torch.equal(*shown([0, 0], flip=False)), "a digit is never mirrored"


def test_hard_labels_are_in_the_middle(packed_once):
    assert order_of(packed_once, hard_epochs=2) == [0, None, None, 1]
    assert order_of(packed_once, hard_epochs=3) == [0, None, None, None]
    twice = order_of(pruned(packed_once, 2, 9), hard_epochs=5)
    assert twice[2:7] == [None] * 5
    assert set(twice[7:]) == {0, 1}


def test_hard_epochs_use_classes_and_views_of_their_own(packed_once):
    order = [None, None]
    batches = list(students._view_batches(packed_once, order, 7, CPU, 0, per_image=False, seed=0))
    assert [len(batch) for batch in batches] == [2] * 6, "views and class shares, no logits"
    whole = torch.cat([views for views, _ in batches])
    assert not torch.equal(whole[:21], whole[21:]), "another epoch has other views"
    again = list(students._view_batches(packed_once, order, 7, CPU, 4, per_image=False, seed=0))
    same_batches(again, batches[4:])
    other = next(students._view_batches(packed_once, order, 7, CPU, 0, per_image=False, seed=1))
    assert not torch.equal(other[0], batches[0][0])
    settings = dataclasses.replace(packed_once.recipe.evaluation, epochs=None, hard_epochs=2, batch_size=7)
    changed = other_logits(packed_once)
    with_hard = [train_student(each, settings, labels="soft", seed=0, device=CPU) for each in (packed_once, changed)]
    assert not same(*(student.state_dict() for student in with_hard)), "two epochs use the stored logits"


def test_hard_epochs_need_the_rules_of_the_views(packed_once):
    source = dataclasses.replace(packed_once, recipe=None)
    settings = dataclasses.replace(packed_once.recipe.evaluation, epochs=None, hard_epochs=2)
    with pytest.raises(DataError, match=r"no recipe\.yaml, whose relabel\.view evaluation\.hard_epochs needs"):
        train_student(source, settings, labels="soft", seed=0, device=CPU)


@pytest.mark.parametrize(
    ("labels", "stopped", "optimizer"),
    [
        *[(labels, stopped, "adamw") for labels in ("soft", "image") for stopped in (5, 6, 7)],
        *[("soft", 6, name) for name in ("adam", "muon", "lion", "lamb", "sgd", "adafactor", "adopt", "nadamw")],
    ],
)
def test_training_resumes_across_the_boundary_of_epochs(
    tiny_recipe, packed_once, tmp_path, monkeypatch, labels, stopped, optimizer
):
    settings = settings_of(tiny_recipe, {"epochs": 4, "label_epochs": 2, "batch_size": 8, "optimizer": optimizer})
    whole = train_student(packed_once, settings, labels=labels, seed=0, device=CPU).state_dict()
    file, steps = Artifact(tmp_path / "state.safetensors", "key"), []

    def stop(checkpoint, make_state):
        steps.append(1)
        if len(steps) == stopped:
            checkpoint.save(make_state())
            raise StoppedError("here")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "tick", stop)
        with pytest.raises(StoppedError):
            train_student(packed_once, settings, labels=labels, seed=0, device=CPU, checkpoint=Checkpoint(file, 1e9))
    found = train_student(packed_once, settings, labels=labels, seed=0, device=CPU, checkpoint=Checkpoint(file, 1e9))
    assert same(whole, found.state_dict())


def test_a_student_with_image_labels_uses_only_those(student, base, toy):
    image = student(labels="image")
    assert same(image, student(labels="image", source=other_logits(toy)))
    assert not same(image, base)
    assert not same(image, student(labels="hard"))
    changed = dataclasses.replace(toy, teacher_logits=toy.teacher_logits.flip(1))
    assert not same(image, student(labels="image", source=changed))
    assert not same(image, student({"loss": "kl"}, labels="image")), "the settings determine the loss"


def test_a_student_reads_the_bytes_of_its_labels(tiny_recipe, packed_once, toy):
    def found(labels, **changes):
        return label_bytes(packed_once, settings_of(tiny_recipe, changes), labels)

    assert found("soft") == packed_once.view_bytes[4]
    assert found("soft", epochs=2) == packed_once.view_bytes[2] < packed_once.view_bytes[3]
    assert found("soft", epochs=2, label_epochs=1) == packed_once.view_bytes[1]
    assert found("soft", epochs=1, label_epochs=2) == packed_once.view_bytes[1]
    assert found("image", epochs=2) == packed_once.image_label_bytes > 0
    assert found("hard") == 0
    assert label_bytes(toy, settings_of(tiny_recipe), "soft") is None


@pytest.fixture(scope="module")
def ceiling(tiny_recipe, split):
    def train(changes=None, *, seed=0):
        made = tiny_recipe({"evaluation.full_data_epochs": 1} | (changes or {}))
        network = train_on_real(split, made.evaluation, made.relabel.view, num_classes=3, seed=seed, device=CPU)
        return network.state_dict()

    return train


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation.full_data_epochs": 2},
        {"evaluation.batch_size": 2},
        {"evaluation.lr": 0.1},
        {"relabel.view.crop_scale": [0.9, 1.0]},
        {"relabel.view.flip": False},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_setting_changes_the_full_data_student(ceiling, change):
    assert not same(ceiling(), ceiling(change))


def test_full_data_student_is_reproducible_and_never_mixes_images(ceiling):
    assert same(ceiling(), ceiling({"relabel.view.mix": "mixup"}))
    assert not same(ceiling(), ceiling(seed=1))


@pytest.mark.parametrize(
    ("epochs", "control", "keys"),
    [
        (1, True, {"full-hard", "random_real-hard", "distilled-hard", "random_real-soft", "distilled-soft"}),
        (0, True, {"random_real-hard", "distilled-hard", "random_real-soft", "distilled-soft"}),
        (1, False, {"full-hard", "distilled-hard", "distilled-soft"}),
    ],
)
def test_full_data_epochs_and_seeds_determine_the_tasks(tiny_recipe, toy, split, tmp_path, epochs, control, keys):
    settings = settings_of(tiny_recipe, {"full_data_epochs": epochs, "seeds": [3, 5]})
    view = tiny_recipe().relabel.view
    sources = {"distilled": toy, "full": split} | ({"random_real": toy} if control else {})
    tasks = student_tasks(sources, split, settings, view, tmp_path, num_classes=3)
    assert sorted((task.row.key, task.seed) for task in tasks) == sorted((key, seed) for key in keys for seed in (3, 5))
    assert [task.row.images for task in tasks[:2]] == (["full"] * 2 if epochs else ["random_real"] * 2), "longest first"
    assert len({row.key for row in ROWS}) == 5


def keep(tiny_recipe, toy, folder, changes=None):
    settings = settings_of(tiny_recipe, {"seeds": [5, 0]} | (changes or {}))
    student = build_network(settings.student, num_classes=3, channels=3).eval()
    source = SourceFacts(id="org/real", on_hub=True, revision="abc", license="mit")
    keep_student(
        student, 0.25, folder=folder / "student", distilled=toy, settings=settings, source=source,
        tested_on=ScoredOn(id="org/real", split="val"), test_count=450, dataset_id="org/set",
    )  # fmt: skip


def test_the_facts_of_a_kept_student_are_complete(tiny_recipe, toy, tmp_path):
    recipe = tiny_recipe()
    keep(tiny_recipe, dataclasses.replace(toy, recipe=recipe), tmp_path, {"ema": 0.5})
    assert json.loads((tmp_path / "student" / "student.json").read_text()) == {
        "kind": "student",
        "architecture": "test_resnet",
        "labels": "soft",
        "epochs": 2,
        "channels": 3,
        "dataset": {"name": "tiny", "content": "toy", "images": 7, "hub_id": "org/set"},
        "source": {"id": "org/real", "on_hub": True, "revision": "abc", "license": "mit"},
        "test": {"id": "org/real", "split": "val"},
        "recipe_fingerprint": recipe.fingerprint(),
        "settings": {
            "batch_size": 4, "loss": "mse_ce", "ce_weight": 0.1, "temperature": 20.0, "lr": 0.01, "weight_decay": 0.01,
            "ema": 0.5,
        },
        "seed": 5,
        "test_top1": 0.25,
        "test_count": 450,
    }  # fmt: skip


def test_without_a_recipe_its_name_and_fingerprint_are_null(tiny_recipe, toy, tmp_path):
    keep(tiny_recipe, toy, tmp_path, {"epochs": 1})
    facts = json.loads((tmp_path / "student" / "student.json").read_text())
    assert (facts["dataset"]["name"], facts["recipe_fingerprint"], facts["epochs"]) == (None, None, 1)


def test_a_transformers_student_is_not_stored_but_logged(tiny_recipe, toy, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="prism_hf"):
        keep(tiny_recipe, toy, tmp_path, {"student": "transformers:resnet"})
    (line,) = (record.message for record in caplog.records)
    assert "only timm architectures" in line
    assert "transformers:resnet" in line
    assert not any(tmp_path.iterdir())
