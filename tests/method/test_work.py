"""The work of a step, counted: no pass, copy or wait for the device that is not needed. Nothing here measures time."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from job_starts import first_job
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prism_hf.dataset.reader import DistilledDataset
from prism_hf.evaluation.students import _view_batches
from prism_hf.images.views import from_columns
from prism_hf.method import synthesize
from prism_hf.method.alignment import Alignment
from prism_hf.method.relabel import _asked, relabel_epoch
from prism_hf.models.squeeze import _batches as teacher_batches
from prism_hf.models.teacher import Teacher
from prism_hf.models.training import _Training
from prism_hf.recipe import override_recipe

NAMES = ("test_resnet", "test_efficientnet", "test_byobnet")


class Passes(TorchDispatchMode):
    """Counts the operators that read or write a tensor of at least `size` values, by name."""

    def __init__(self, size):
        super().__init__()
        self.size, self.counts = size, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (*args, *(kwargs or {}).values(), result) if isinstance(t, torch.Tensor)]
        name = function.overloadpacket.__name__
        moves = {"view", "permute", "_unsafe_view", "detach", "alias", "empty_like", "t", "expand", "as_strided"}
        if name not in moves and any(t.numel() >= self.size for t in tensors):
            self.counts[name] = self.counts.get(name, 0) + 1
        return result


def test_a_layer_reads_its_input_twice_forward_and_once_backward():
    """Forward: the layer and the statistics. Backward: one pass over the input, and one over the incoming gradient."""
    layer = nn.BatchNorm2d(8).eval().requires_grad_(False)
    x = torch.randn(4, 8, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    align = Alignment(nn.Sequential(layer))
    align(x)
    with Passes(x.numel()) as forward:
        logits, mismatch = align(x)
    assert forward.counts == {"native_batch_norm": 1, "batch_norm_update_stats": 1}
    gradient = torch.randn_like(x)
    with Passes(x.numel()) as backward:
        torch.autograd.backward([logits, mismatch], [gradient, torch.ones(())])
    assert {k: n for k, n in backward.counts.items() if k.startswith("addcmul")} == {"addcmul": 1, "addcmul_": 1}
    assert sum(backward.counts.values()) <= 3  # the third stores the gradient of x


@pytest.fixture
def many(tiny_recipe):
    names = [f"squeeze:{name}" for name in NAMES]
    changes = {"teachers.logit": names[0], "teachers.bn_pool": names[1:], "teachers.draw_probability": 1.0}
    return tiny_recipe(changes | {"teachers.extras": 2, "synthesis.iterations": 4})


def teachers_on(device, classes):
    made = {}
    for name in NAMES:
        with torch.device(device):
            model = timm.create_model(name, num_classes=classes).eval().requires_grad_(False)
        model = model.to(memory_format=torch.channels_last)
        norm = ((0.5,) * 3, (0.25,) * 3)
        key = f"squeeze:{name}"
        made[key] = Teacher(key, model, *norm, 32, classes, name, "none", None, "", None)
    return made


def test_a_step_runs_each_drawn_teacher_once(many):
    job, settings, initial = first_job(many)
    teachers, runs = teachers_on("cpu", 4), dict.fromkeys(NAMES, 0)
    for key, teacher in teachers.items():
        first = next(m for m in teacher.model.modules() if isinstance(m, nn.Conv2d))
        name = key.removeprefix("squeeze:")
        first.register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    steps = synthesize(job, settings, initial, teachers)
    for number in (1, 2, 3):
        next(steps)
        assert runs == dict.fromkeys(NAMES, number)


@pytest.mark.parametrize("name", NAMES)
def test_alignment_saves_no_activation_that_the_network_does_not_save(name):
    torch.manual_seed(0)
    teacher = teachers_on("cpu", 4)[f"squeeze:{name}"]
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()

    def saved(run):
        storages = {}
        keep = lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            result = run()
        weights = {p.untyped_storage().data_ptr() for p in (*teacher.model.parameters(), *teacher.model.buffers())}
        return sum(size for place, size in storages.items() if place not in weights), result

    align = Alignment(teacher.model)
    align(x)
    plain, _ = saved(lambda: teacher.model(x))
    ours, _ = saved(lambda: align(x))
    statistics = sum(m.num_features for m in teacher.model.modules() if isinstance(m, nn.BatchNorm2d))
    assert ours <= plain + 40 * 4 * statistics  # numbers per channel, but no activation


@pytest.mark.parametrize("change", [{}, {"synthesis.momentum": 0.4}, {"synthesis.bn_reduction": "mean"}], ids=str)
def test_no_step_waits_for_the_device(many, change):
    """Tensors on the `meta` device have no values: reading one, or mixing devices, is an error."""
    job, settings, initial = first_job(override_recipe(many, change))
    steps = synthesize(job, settings, initial.to("meta"), teachers_on("meta", 4))
    for number, step in zip((1, 2, 3), steps, strict=False):
        assert step.number == number
        assert step.pixels.device.type == "meta"
        assert all(term is None or term.device.type == "meta" for term in step.terms)


def test_the_meta_device_refuses_a_read(many):
    """The test above can fail: a value that is read in the loop is an error."""
    job, settings, initial = first_job(many)
    teachers = teachers_on("meta", 4)
    first = next(iter(teachers.values())).model
    first.register_forward_hook(lambda _, __, logits: logits * float(logits.sum()))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        next(synthesize(job, settings, initial.to("meta"), teachers))


META = torch.device("meta")


def test_no_batch_of_labels_waits_for_the_device(many, tiny_images):
    teachers = list(teachers_on("meta", 4).values())
    settings = override_recipe(many, {"relabel.view.mix": "cutmix", "relabel.batch_size": 4}).relabel
    batches = list(_asked(0, tiny_images, teachers, settings, 0))
    assert sum(len(columns["epoch"]) for columns, _ in batches) == len(tiny_images)
    assert all(labels.device == META and labels.dtype == torch.float16 for _, labels in batches)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_no_step_of_training_waits_for_the_device(schedule):
    with META:
        network = timm.create_model("test_resnet", num_classes=4)
    training = _Training(network, "x", steps=9, lr=1e-3, weight_decay=0.01, schedule=schedule, ema=0.0)
    images, labels = torch.rand(4, 3, 32, 32, device=META), torch.zeros(4, dtype=torch.int64, device=META)
    for _ in range(3):
        training.advance(F.cross_entropy, images, [labels])
    assert training.step == 3
    assert all(loss.device == META for loss in training.losses)


def test_no_batch_for_a_student_waits_for_the_device(many, tiny_teachers, tiny_images):
    settings = override_recipe(many, {"relabel.view.mix": "cutmix"}).relabel
    columns = relabel_epoch(0, tiny_images, [tiny_teachers["test_resnet"]], settings, seed=0)

    def views(_, rows):
        part = slice(rows.start, rows.stop)
        return from_columns(columns)[part], torch.from_numpy(columns["teacher_logits"])[part]

    labels = torch.zeros(len(tiny_images), dtype=torch.int64)
    images = torch.zeros(len(tiny_images), 4)
    source = DistilledDataset(tiny_images, labels, tuple("abcd"), images, 1, views, 1, 1, None, "toy")
    for per_image in (False, True):
        batches = list(_view_batches(source, [0], 4, META, 0, per_image=per_image, seed=0))
        assert all(tensor.device == META for batch in batches for tensor in batch)


class Table:
    """Real images in memory."""

    def __init__(self, images):
        self.table, self.labels = images, np.zeros(len(images), np.int64)

    def __len__(self):
        return len(self.table)

    def images(self, rows):
        return self.table[rows]


def test_no_batch_for_a_teacher_waits_for_the_device(many, tiny_images):
    split = Table(tiny_images)
    settings = override_recipe(many, {"squeeze.batch_size": 3, "squeeze.epochs": 1}).squeeze
    teacher = next(iter(teachers_on("meta", 4).values()))
    batches = list(teacher_batches(split, settings, 0, teacher))
    assert len(batches) == len(tiny_images) // 3
    assert all(tensor.device == META for batch in batches for tensor in batch)


@pytest.mark.slow
def test_a_compiled_teacher_serves_all_jobs_without_recompilation(tiny_recipe):
    recipe = tiny_recipe({"teachers.logit": "squeeze:test_resnet", "teachers.bn_pool": [], "teachers.extras": 3})
    recipe = override_recipe(recipe, {"synthesis.iterations": 3, "synthesis.ipc": 2})
    teachers = {"squeeze:test_resnet": teachers_on("cpu", 3)["squeeze:test_resnet"]}
    last, counters = {}, torch._dynamo.utils.counters
    for number in range(2):
        job, settings, initial = first_job(recipe, number)
        for compile in ("off", "on"):
            counters.clear()
            steps = list(synthesize(job, settings, initial, teachers, compile=compile))
            last[compile] = steps[-1].pixels
            compiled = counters["stats"]["unique_graphs"]
            assert (compiled > 0) == (compile == "on" and number == 0), (number, compile, compiled)
        torch.testing.assert_close(last["on"], last["off"], rtol=0, atol=0.02)
