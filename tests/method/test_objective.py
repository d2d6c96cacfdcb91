import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from slow_statistics import gathered
from torch import nn

from prism_hf.method.objective import Objective
from prism_hf.recipe.plan import plan_jobs

LABELS = torch.tensor([0, 1, 2, 1])
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
PATCH = 8
CHOSEN = [
    ("test_resnet",),
    ("test_resnet", "test_efficientnet"),
    ("test_resnet", "test_byobnet", "test_efficientnet"),
    ("test_efficientnet", "test_byobnet"),
    (),
]
CYCLE = {
    "teachers.selection": "cycle",
    "teachers.extras": 3,
    "teachers.draw_probability": 0.5,
    "synthesis.batch_order": "within_class",
    "synthesis.batch_size": 4,
    "synthesis.momentum": 0.4,
}
FULL = CYCLE | {"synthesis.conv": {"patch": PATCH}, "synthesis.densification": {"size": 8}}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def batch(dtype=torch.float32, size=32, seed=0):
    x = torch.randn((4, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def of_dtype(teachers, dtype):
    return {n: dataclasses.replace(t, model=copy.deepcopy(t.model).to(dtype)) for n, t in teachers.items()}


def close(a, b, tolerance):
    return float((a - b).detach().norm() / b.detach().norm()) < tolerance


# -- slow, literal reference versions -----------------------------------------------------------------------------------


def inputs_of(model, x):
    """Return the logits, and all BN layers and convolutions with their inputs, in the order in which they run."""
    seen = []
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(lambda m, i: seen.append((m, i[0]))) for layer in layers]
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits, seen


def mean_var(x):
    return x.mean(), ((x - x.mean()) ** 2).mean()


def of_channels(x):
    return dict(zip(("mean", "var"), map(torch.stack, zip(*map(mean_var, x.unbind(1)), strict=True)), strict=True))


def of_patches(x, patch):
    """Patch statistics, for sides that are multiples of the patch or less than twice the patch."""
    high, wide = (max(1, side // patch) for side in x.shape[2:])
    cells = [cell for row in x.chunk(high, 2) for cell in row.chunk(wide, 3)]
    return dict(zip(("mean", "var"), map(torch.stack, zip(*map(mean_var, cells), strict=True)), strict=True))


def running(layer):
    return {"mean": layer.running_mean, "var": layer.running_var}


def slow_alignment(model, x, reduction, first_bn_multiplier):
    _, seen = inputs_of(model, x)
    terms = []
    for layer, found in seen:
        if isinstance(layer, nn.BatchNorm2d):
            weight, batch_, real = 1.0 if terms else first_bn_multiplier, of_channels(found), running(layer)
            terms.append(weight * sum(((batch_[key] - real[key]) ** 2).sum().sqrt() for key in ("mean", "var")))
    return sum(terms) / (len(terms) if reduction == "mean" else 1)


def slow_objective(teachers, view, labels, logit, chosen, *, bn_weight, reduction, first):
    """Method section 1, taken literally: one forward pass for CE, and another for each BN teacher."""
    ce = F.cross_entropy(teachers[logit].model(teachers[logit].prepare(view)), labels)
    bn = sum(slow_alignment(teachers[n].model, teachers[n].prepare(view), reduction, first) for n in chosen)
    bn = bn / len(chosen) if chosen else torch.zeros(())
    return ce, bn, ce + bn_weight * bn


class SlowGVBSM:
    """Method section 3, taken literally: one teacher per iteration, which gives CE and statistics."""

    def __init__(self, names, teachers, settings, statistics, drawn):
        self.names, self.teachers, self.settings, self.statistics, self.drawn = names, teachers, settings, statistics, drawn
        self.past = {name: {} for name in names}

    def smooth(self, past, key, batch_):
        """Return the value of the average with the gradient of the batch."""
        now = batch_.detach()
        if key in past:
            now = self.settings.momentum * past[key] + (1 - self.settings.momentum) * now
        past[key] = now
        return now + batch_ - batch_.detach()

    def distance(self, past, key, batch_, real):
        smoothed = {part: self.smooth(past, (key, part), value) for part, value in batch_.items()}
        return sum(torch.linalg.vector_norm(value - real[part]) for part, value in smoothed.items())

    def __call__(self, iteration, view):
        name = self.names[iteration % len(self.names)]
        teacher, past, conv = self.teachers[name], self.past[name], self.settings.conv
        logits, seen = inputs_of(teacher.model, teacher.prepare(view))
        convs = [layer for layer, _ in seen if isinstance(layer, nn.Conv2d)] if conv else []
        kept = (torch.rand(len(convs), generator=self.drawn) >= (conv.drop if conv else 0)).tolist()
        total, norms, place = 0.0, 0, 0
        for layer, found in seen:
            if isinstance(layer, nn.BatchNorm2d):
                weight = 1.0 if norms else self.settings.first_bn_multiplier
                total = total + weight * self.distance(past, ("bn", norms), of_channels(found), running(layer))
                norms += 1
            elif conv:
                real = {key.partition(".")[2]: v for key, v in self.statistics[name].items() if key.startswith(f"{place}.")}
                batch_ = {f"channel_{key}": value for key, value in of_channels(found).items()}
                batch_ |= {f"patch_{key}": value for key, value in of_patches(found, conv.patch).items()}
                if kept[place]:
                    total = total + self.distance(past, ("conv", place), batch_, real)
                place += 1
        bn = total / (norms + place if self.settings.bn_reduction == "mean" else 1)
        ce = F.cross_entropy(logits, LABELS)
        dense = self.density(view)
        return ce, bn, dense, ce + self.settings.bn_weight * bn + (dense if dense is not None else 0)

    def density(self, view):
        rule, total = self.settings.densification, 0.0
        if rule is None:
            return None
        for label in set(LABELS.tolist()):
            x = F.avg_pool2d(view[LABELS == label], view.shape[-1] // rule.size).flatten(1)
            if len(x) > 1:
                values = torch.linalg.eigvalsh(x @ x.T)
                target = F.softmax(values.detach() / rule.temperature, 0)
                total = total + (target * (target.log() - F.log_softmax(values, 0))).sum()
        return rule.weight * total


# -- SRe2L and PRISM ----------------------------------------------------------------------------------------------------


def made_of(recipe, teachers, statistics=None, generator=None):
    more = {"generator": generator or torch.Generator(), "statistics": statistics}
    return Objective(recipe.teachers, recipe.synthesis, teachers, **more)


@every_dtype
@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda c: "+".join(c) or "none")
@pytest.mark.parametrize(
    ("reduction", "first", "bn_weight"),
    [("sum", 10.0, 0.01), ("mean", 1.0, 1.0), ("mean", 10.0, 0.1), ("sum", 0.0, 0.5)],
)
def test_objective_equals_the_equation(tiny_recipe, tiny_teachers, dtype, chosen, reduction, first, bn_weight):
    teachers, view = of_dtype(tiny_teachers, dtype), batch(dtype)
    settings = {"bn_weight": bn_weight, "reduction": reduction}
    changes = {
        "synthesis.bn_weight": bn_weight,
        "synthesis.bn_reduction": reduction,
        "synthesis.first_bn_multiplier": first,
    }
    recipe = tiny_recipe(changes | {"teachers.include_logit": "test_resnet" in chosen})
    objective = made_of(recipe, teachers)
    terms = objective.backward(view, LABELS, chosen, logit="test_resnet")
    literal = batch(dtype)
    ce, bn, loss = slow_objective(teachers, literal, LABELS, "test_resnet", chosen, first=first, **settings)
    loss.backward()
    assert close(terms.ce, ce, TOLERANCE[dtype])
    assert close(terms.bn, bn, TOLERANCE[dtype]) or (not chosen and float(terms.bn) == 0)
    assert close(view.grad, literal.grad, TOLERANCE[dtype])
    assert terms.grad == view.grad.abs().max()
    assert terms.densification is None


def test_a_hooked_logit_teacher_outside_s_gives_no_bn_term(tiny_recipe, tiny_teachers):
    view, literal = batch(), batch()
    chosen, settings = ("test_efficientnet",), {"bn_weight": 0.1, "reduction": "sum"}
    objective = made_of(tiny_recipe({"synthesis.bn_weight": 0.1}), tiny_teachers)
    terms = objective.backward(view, LABELS, chosen, logit="test_resnet")
    _, bn, loss = slow_objective(tiny_teachers, literal, LABELS, "test_resnet", chosen, first=10.0, **settings)
    loss.backward()
    assert close(terms.bn, bn, 1e-5)
    assert close(view.grad, literal.grad, 1e-5)


@every_dtype
@pytest.mark.parametrize(
    "changes",
    [
        {"teachers.bn_pool": []},
        {"teachers.bn_pool": [], "synthesis.bn_reduction": "mean", "synthesis.first_bn_multiplier": 3.0},
        {"teachers.extras": 2},
        {"teachers.extras": 2, "synthesis.bn_reduction": "mean"},
        {"teachers.extras": 2, "teachers.include_logit": False},
    ],
    ids=["SRe2L", "SRe2L, mean", "PRISM", "PRISM, mean", "PRISM, logit teacher apart"],
)
def test_a_recipe_yields_its_equation(tiny_recipe, tiny_teachers, dtype, changes):
    recipe, teachers = tiny_recipe({"synthesis.bn_weight": 0.1, **changes}), of_dtype(tiny_teachers, dtype)
    job, settings, view, literal = plan_jobs(recipe)[0], recipe.synthesis, batch(dtype), batch(dtype)
    objective = made_of(recipe, teachers)
    terms = objective.backward(view, LABELS, job.bn_teachers(0), logit=job.logit_teacher(0))
    assert objective.state() == {}
    words = {"reduction": settings.bn_reduction, "first": settings.first_bn_multiplier}
    chosen = (*(["test_resnet"] if recipe.teachers.include_logit else []), *recipe.teachers.bn_pool)
    *_, loss = slow_objective(teachers, literal, LABELS, "test_resnet", chosen, bn_weight=0.1, **words)
    loss.backward()
    assert close(terms.ce + 0.1 * terms.bn, loss, TOLERANCE[dtype])
    assert close(view.grad, literal.grad, TOLERANCE[dtype])


@every_dtype
def test_balanced_divides_each_teachers_term_by_its_value_on_the_start_images(tiny_recipe, tiny_teachers, dtype):
    recipe = tiny_recipe({"teachers.extras": 2, "synthesis.bn_reduction": "balanced", "synthesis.bn_weight": 0.5})
    teachers, start, view, literal = of_dtype(tiny_teachers, dtype), batch(dtype, seed=1), batch(dtype), batch(dtype)
    names = tuple(teachers)
    objective = made_of(recipe, teachers)
    objective.balance(start.detach())
    at_start = objective.backward(start, LABELS, names, logit="test_resnet")
    terms = objective.backward(view, LABELS, names, logit="test_resnet")
    assert float(at_start.bn) == pytest.approx(1, rel=1e-6), "every teacher has equal weight at the start"

    def term(name, x):
        return slow_alignment(teachers[name].model, teachers[name].prepare(x), "sum", 10.0)

    with torch.no_grad():
        scales = {name: term(name, batch(dtype, seed=1)) for name in names}
    bn = sum(term(name, literal) / scales[name] for name in names) / len(names)
    logits = teachers["test_resnet"].model(teachers["test_resnet"].prepare(literal))
    (F.cross_entropy(logits, LABELS) + 0.5 * bn).backward()
    assert close(terms.bn, bn, TOLERANCE[dtype])
    assert close(view.grad, literal.grad, 2 * TOLERANCE[dtype])
    assert len({round(float(scale), 3) for scale in scales.values()}) == 3


@pytest.mark.parametrize("changes", [{"teachers.extras": 2}, CYCLE], ids=["PRISM", "G-VBSM"])
def test_a_weight_of_zero_leaves_only_the_classification_loss(tiny_recipe, tiny_teachers, changes):
    recipe = tiny_recipe({**changes, "synthesis.bn_weight": 0.0})
    job, view, literal = plan_jobs(recipe)[0], batch(), batch()
    objective = made_of(recipe, tiny_teachers)
    terms = objective.backward(view, LABELS, job.bn_teachers(0), logit=job.logit_teacher(0))
    teacher = tiny_teachers["test_resnet"]
    F.cross_entropy(teacher.model(teacher.prepare(literal)), LABELS).backward()
    assert float(terms.bn) > 0, "the BN term is still reported"
    assert close(view.grad, literal.grad, 1e-6)


# -- G-VBSM -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics(tiny_teachers, tiny_images):
    return {name: gathered(teacher, tiny_images, PATCH) for name, teacher in tiny_teachers.items()}


GVBSM = {
    "in full": FULL,
    "mean of layers, some left out": FULL
    | {"synthesis.conv": {"patch": PATCH, "drop": 0.4}, "synthesis.bn_reduction": "mean", "synthesis.bn_weight": 1.0},
    "without averages": FULL | {"synthesis.momentum": 0.0, "synthesis.densification": None},
    "BN only": CYCLE | {"synthesis.bn_weight": 0.2},
    "heavy densification": CYCLE | {"synthesis.densification": {"weight": 3.0, "temperature": 2.0, "size": 4}},
}


@pytest.mark.parametrize(("kind", "dtype"), [("in full", torch.float32), *((kind, torch.float64) for kind in GVBSM)])
def test_gvbsm_equals_the_equation_over_several_iterations(tiny_recipe, tiny_teachers, statistics, dtype, kind):
    recipe = tiny_recipe(GVBSM[kind])
    teachers, settings, job = of_dtype(tiny_teachers, dtype), recipe.synthesis, plan_jobs(recipe)[0]
    names = ("test_resnet", "test_efficientnet", "test_byobnet")
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    slow = SlowGVBSM(names, teachers, settings, statistics, theirs)
    tolerance = TOLERANCE[dtype] * (1 if dtype == torch.float64 else 20)
    objective = made_of(recipe, teachers, statistics, ours)
    for iteration in range(5):
        view, literal = batch(dtype, seed=iteration), batch(dtype, seed=iteration)
        terms = objective.backward(view, LABELS, job.bn_teachers(iteration), logit=job.logit_teacher(iteration))
        ce, bn, dense, loss = slow(iteration, literal)
        loss.backward()
        assert close(terms.ce, ce, tolerance)
        assert close(terms.bn, bn, tolerance)
        weight = settings.densification.weight if settings.densification else None
        assert (terms.densification is None) == (dense is None)
        assert dense is None or close(weight * terms.densification, dense, tolerance)
        assert close(view.grad, literal.grad, tolerance), iteration
    assert math.isfinite(float(loss.detach()))
    smoothed = {key.split("/")[1] for key in objective.state()}
    assert smoothed == (set(names) if settings.momentum else set())


def test_averages_of_an_earlier_launch_are_continued(tiny_recipe, tiny_teachers, statistics):
    recipe = tiny_recipe(FULL)
    job, gradients = plan_jobs(recipe)[0], []
    for stop in (6, 4):
        views, saved = [batch(seed=n) for n in range(6)], {}
        for part in (range(stop), range(stop, 6)):
            objective = made_of(recipe, tiny_teachers, statistics)
            objective.restore(saved | {"pixels": batch()})
            for n in part:
                objective.backward(views[n], LABELS, job.bn_teachers(n), logit=job.logit_teacher(n))
            saved = objective.state()
        gradients.append([view.grad for view in views])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# -- every method -------------------------------------------------------------------------------------------------------


def calls_of(teachers, objective, steps):
    counts = dict.fromkeys(teachers, 0)

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    handles = [t.model.register_forward_pre_hook(count(n)) for n, t in teachers.items()]
    try:
        for chosen, logit in steps:
            objective.backward(batch(), LABELS, chosen, logit=logit)
    finally:
        for handle in handles:
            handle.remove()
    return counts


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda c: "+".join(c) or "none")
def test_each_teacher_runs_once_a_step(tiny_recipe, tiny_teachers, chosen):
    objective = made_of(tiny_recipe({"synthesis.bn_weight": 0.1}), tiny_teachers)
    counts = calls_of(tiny_teachers, objective, [(chosen, "test_resnet")] * 2)
    assert counts == {n: 2 if n in (*chosen, "test_resnet") else 0 for n in tiny_teachers}


def test_with_cycle_one_teacher_runs_a_step(tiny_recipe, tiny_teachers, statistics):
    recipe = tiny_recipe(FULL)
    job = plan_jobs(recipe)[0]
    steps = [(job.bn_teachers(n), job.logit_teacher(n)) for n in range(4)]
    counts = calls_of(tiny_teachers, made_of(recipe, tiny_teachers, statistics), steps)
    assert counts == {"test_resnet": 2, "test_efficientnet": 1, "test_byobnet": 1}


def test_teachers_stay_frozen(tiny_recipe, tiny_teachers, statistics):
    before = {n: copy.deepcopy(t.model.state_dict()) for n, t in tiny_teachers.items()}
    recipe = tiny_recipe(FULL)
    objective = made_of(recipe, tiny_teachers, statistics)
    for name in tiny_teachers:
        objective.backward(batch(), LABELS, (name,), logit=name)
    objective = made_of(tiny_recipe({"synthesis.bn_weight": 0.1}), tiny_teachers)
    objective.backward(batch(), LABELS, tuple(tiny_teachers), logit="test_resnet")
    for name, teacher in tiny_teachers.items():
        assert all(torch.equal(v, before[name][k]) for k, v in teacher.model.state_dict().items())
        assert all(p.grad is None for p in teacher.model.parameters())
        assert not any(m._forward_pre_hooks for m in teacher.model.modules())
