import math
from collections import Counter

import pytest
import torch
from job_starts import DENSE, STILL, TWO_SLOTS, first_job, start
from slow_statistics import gathered, same

from prism_hf.method import synthesis as module
from prism_hf.method.synthesis import crop_range, draw_view, synthesize
from prism_hf.recipe.plan import plan_jobs
from prism_hf.recipe.synthesis import SynthesisView


def trace_of(steps, initial=None):
    """Return the number, learning rate and terms of each step, and the final pixels."""
    trace, pixels = [], initial
    for step in steps:
        pixels = step.pixels
        trace.append((step.number, step.lr, *(None if term is None else float(term) for term in step.terms)))
    return trace, pixels.clone()


def run_one(recipe, teachers, number=0, **more):
    job = first_job(recipe, number)
    return trace_of(synthesize(*job, teachers, **more), job[-1])


def run_all(recipe, teachers, **more):
    """Return the pixels of all jobs by (class, slot), and their traces."""
    pixels, traces = start(recipe), []
    for job in plan_jobs(recipe):
        trace, pixels[job.classes, job.slots] = run_one(recipe, teachers, job.id, **more)
        traces.append(trace)
    return pixels, traces


LADDER = {"synthesis.ipc": 3, "synthesis.ladder": {"step": 1, "period": 2}}
CONV = {"synthesis.conv": {"patch": 8}}
DRAWS = {"teachers.extras": 3, "teachers.draw_probability": 0.5}
SWITCHES = [
    ({}, {"seed": 1}),
    ({}, {"synthesis.iterations": 5}),
    ({}, {"synthesis.lr": 0.1}),
    ({}, {"synthesis.betas": [0.9, 0.9]}),
    ({}, {"synthesis.betas": [0.5, 0.999]}),
    ({}, {"synthesis.lr_schedule": "constant"}),
    ({}, {"synthesis.bn_weight": 0.1}),
    ({}, {"synthesis.bn_reduction": "mean"}),
    ({}, {"synthesis.first_bn_multiplier": 1.0}),
    ({}, {"synthesis.view.crop_scale": [0.9, 1.0]}),
    ({}, {"synthesis.view.crop_scale": [0.5, 0.6]}),
    ({}, {"synthesis.view.flip": False}),
    ({}, {"synthesis.view.jitter": 0}),
    ({}, {"synthesis.clamp": False}),
    ({}, {"synthesis.batch_order": "within_class"}),
    ({"synthesis.slots_per_batch": 2}, {"synthesis.batch_size": 6}),
    ({}, {"synthesis.slots_per_batch": 2}),
    ({"synthesis.ipc": 3}, {"synthesis.ladder": {"step": 1, "period": 2}}),
    (LADDER, {"synthesis.ladder": {"step": 2, "period": 2}}),
    (LADDER, {"synthesis.ladder": {"step": 1, "period": 3}}),
    ({}, {"teachers.logit": "verifier"}),
    ({}, {"teachers.bn_pool": []}),
    ({}, {"teachers.bn_pool": ["verifier"]}),
    ({}, {"teachers.include_logit": False}),
    ({}, {"teachers.extras": 0}),
    ({}, {"teachers.extras": 2}),
    ({}, {"teachers.draw_probability": 0.0}),
    ({}, {"teachers.selection": "per_iteration"}),
    ({}, {"synthesis.iterations": 0, "synthesis.init": "real_random"}),
    ({}, {"synthesis.bn_reduction": "balanced"}),
    ({}, {"synthesis.view.curriculum": "cosine"}),
    ({}, {"synthesis.momentum": 0.4}),
    ({"synthesis.momentum": 0.4}, {"synthesis.momentum": 0.5}),
    ({}, CONV),
    (CONV, {"synthesis.conv": {"patch": 4}}),
    (CONV, {"synthesis.conv": {"patch": 8, "drop": 0.5}}),
    (CONV, {"synthesis.bn_reduction": "mean"}),
    (TWO_SLOTS, DENSE),
    ({**TWO_SLOTS, **DENSE}, {"synthesis.densification": {"size": 8, "weight": 2.0}}),
    ({**TWO_SLOTS, **DENSE}, {"synthesis.densification": {"size": 8, "temperature": 2.0}}),
    ({**TWO_SLOTS, **DENSE}, {"synthesis.densification": {"size": 4}}),
    (DRAWS, {"teachers.selection": "cycle"}),
]


@pytest.fixture(scope="module")
def teachers(tiny_teachers, tiny_verifier):
    return {**tiny_teachers, "verifier": tiny_verifier}


@pytest.fixture(scope="module")
def statistics(teachers, tiny_images):
    """Statistics of convolutions on a handful of images, for two patch sizes."""

    return {patch: {name: gathered(teacher, tiny_images, patch) for name, teacher in teachers.items()} for patch in (4, 8)}


@pytest.fixture(scope="module")
def outcome(tiny_recipe, teachers, statistics):
    known = {}

    def run(changes):
        key = repr(changes)
        if key not in known:
            recipe = tiny_recipe(changes)
            conv = recipe.synthesis.conv
            known[key] = run_all(recipe, teachers, statistics=statistics[conv.patch] if conv else None)[0]
        return known[key]

    return run


@pytest.mark.parametrize(("base", "change"), SWITCHES, ids=lambda c: "-".join(c) or "base")
def test_every_setting_changes_the_images(outcome, base, change):
    # Except for `seed`, no seed depends on these fields, so the images differ only because the field is read.
    assert not torch.equal(outcome(base), outcome({**base, **change}))


@pytest.mark.parametrize("ends", [(0.08, 1.0), (0.3, 0.6)])
def test_the_curriculum_goes_from_the_largest_crop_to_the_whole_range(ends):
    plain, course = (SynthesisView(crop_scale=ends, curriculum=rule) for rule in ("none", "cosine"))
    assert all(crop_range(plain, progress) == ends for progress in (0.0, 0.5, 1.0))
    assert crop_range(course, 0.0) == (ends[1], ends[1])
    assert crop_range(course, 1.0) == pytest.approx(ends)
    assert crop_range(course, 0.5) == pytest.approx((sum(ends) / 2, ends[1]))
    lows = [crop_range(course, n / 20)[0] for n in range(21)]
    assert lows == sorted(lows, reverse=True)


def test_a_job_reaches_both_ends_of_the_curriculum(tiny_recipe, teachers, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "crop_range", lambda view, progress: seen.append(progress) or (1.0, 1.0))
    for iterations in (5, 1):
        run_one(tiny_recipe({"synthesis.iterations": iterations, "teachers.bn_pool": []}), teachers)
    assert seen == [0, 0.25, 0.5, 0.75, 1, 0]


def test_ladder_does_not_change_the_first_slot(outcome):
    plain, ladder = outcome({"synthesis.ipc": 3}), outcome(LADDER)
    assert [torch.equal(plain[:, slot], ladder[:, slot]) for slot in range(3)] == [True, False, True]


def test_a_job_gives_the_same_bytes_twice(tiny_recipe, teachers, outcome):
    pixels, traces = run_all(tiny_recipe(), teachers)
    assert torch.equal(pixels, outcome({}))
    assert traces == run_all(tiny_recipe(), teachers)[1]


def test_a_job_does_not_depend_on_earlier_jobs_or_global_randomness(tiny_recipe, teachers, outcome):
    job = plan_jobs(tiny_recipe())[-1]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    _, pixels = run_one(tiny_recipe(), teachers, job.id)
    assert torch.equal(pixels, outcome({})[job.classes, job.slots])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_job_without_iterations_yields_nothing(tiny_recipe, teachers):
    recipe = tiny_recipe({"synthesis.iterations": 0, "synthesis.init": "real_random", "teachers.bn_pool": []})
    assert list(synthesize(*first_job(recipe), teachers)) == []


def test_steps_are_numbered_and_report_their_terms(tiny_recipe, teachers):
    job, settings, initial = first_job(tiny_recipe(TWO_SLOTS | DENSE))
    before, seen = initial.clone(), []
    for step in synthesize(job, settings, initial, teachers):
        assert step.pixels.shape == initial.shape
        assert step.pixels.dtype == torch.float32
        assert not step.pixels.requires_grad
        assert all(term.shape == () and not term.requires_grad for term in step.terms)
        assert step.terms.grad > 0
        assert step.terms.densification > 0
        seen.append(step.number)
    assert seen == [1, 2, 3, 4]
    assert torch.equal(initial, before), "the start images are not modified"
    assert not initial.requires_grad


def test_a_step_updates_the_returned_pixels_in_place(tiny_recipe, teachers):
    steps = synthesize(*first_job(tiny_recipe()), teachers)
    first = next(steps).pixels
    before = first.clone()
    second = next(steps).pixels
    assert torch.equal(first, second)
    assert not torch.equal(before, second)


def test_closing_the_iterator_leaves_the_networks_as_they_were(tiny_recipe, teachers):
    def changed():
        layers = [m for t in teachers.values() for m in t.model.modules()]
        return sum(len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in layers)

    before, steps = changed(), synthesize(*first_job(tiny_recipe()), teachers)
    next(steps)
    steps.close()
    assert changed() == before


def test_gray_images_work_with_teachers_of_three_channels(tiny_recipe, teachers):
    assert run_one(tiny_recipe({"data.channels": 1}), teachers)[1].shape == (3, 1, 32, 32)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_both_terms_decrease(tiny_recipe, teachers, reduction):
    weight = 0.01 if reduction == "sum" else 0.3
    changes = {"synthesis.view": STILL, "synthesis.bn_weight": weight, "synthesis.bn_reduction": reduction}
    trace, _ = run_one(tiny_recipe(changes | {"synthesis.iterations": 40}), teachers)
    (_, _, first_ce, first_bn, *_), (_, _, last_ce, last_bn, *_) = trace[0], trace[-1]
    assert last_ce < 0.8 * first_ce
    assert last_bn < 0.95 * first_bn


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate_follows_its_schedule(tiny_recipe, teachers, schedule):
    made = tiny_recipe({"synthesis.iterations": 20, "synthesis.lr_schedule": schedule, "teachers.bn_pool": []})
    rates = [lr for _, lr, *_ in run_one(made, teachers)[0]]
    cosine = [0.05 * 0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert rates == pytest.approx([0.05] * 20 if schedule == "constant" else cosine, rel=1e-6)


@pytest.mark.parametrize("clamp", [True, False])
def test_clamp_keeps_pixels_in_the_valid_range_during_optimization(tiny_recipe, teachers, clamp):
    changes = {"synthesis.view": STILL, "synthesis.lr": 2.0, "synthesis.clamp": clamp, "teachers.bn_pool": []}
    teacher, seen = teachers["test_resnet"], []
    handle = teacher.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    try:
        run_one(tiny_recipe(changes), teachers)
    finally:
        handle.remove()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (teacher.mean, teacher.std))
    pixels = torch.stack([x * std + mean for x in seen[1:4]])
    assert (float(pixels.min()) > -1e-5 and float(pixels.max()) < 1 + 1e-5) == clamp


def test_with_an_empty_s_only_the_logit_teacher_counts(tiny_recipe, teachers):
    empty = {"teachers.include_logit": False, "teachers.draw_probability": 0.0}
    trace, pixels = run_one(tiny_recipe(empty), teachers)
    assert all(bn == 0 for _, _, _, bn, *_ in trace)
    assert torch.equal(pixels, run_one(tiny_recipe(empty | {"synthesis.bn_weight": 9.0}), teachers)[1])
    # A BN layer that is matched has a backward pass of its own, which rounds differently.
    torch.testing.assert_close(pixels, run_one(tiny_recipe({"synthesis.bn_weight": 0.0}), teachers)[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("selection", ["per_slot", "per_iteration", "cycle"])
def test_exactly_the_drawn_teachers_run(tiny_recipe, teachers, selection):
    draws = DRAWS if selection == "cycle" else {}
    made = tiny_recipe({"teachers.selection": selection, "synthesis.iterations": 12, **draws})
    job, order = plan_jobs(made)[0], []
    handles = [
        teachers[name].model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name in made.teachers.synthesis_names
    ]
    try:
        run_one(made, teachers)
    finally:
        for handle in handles:
            handle.remove()
    drawn = [name for step in range(12) for name in job.bn_teachers(step)]
    assert order == drawn
    counts = Counter(order)
    assert (0 < counts["test_byobnet"] < 12) == (selection != "per_slot")


@pytest.mark.parametrize(
    ("jitter", "flip", "count"), [(0, False, 1), (0, True, 2), (1, False, 4), (1, True, 8), (2, False, 9)]
)
def test_step_view_draws_each_roll_and_flip(jitter, flip, count):
    images = torch.arange(2 * 3 * 36.0).view(2, 3, 6, 6)
    generator = torch.Generator().manual_seed(0)
    settings = SynthesisView(crop_scale=(1.0, 1.0), flip=flip, jitter=jitter)
    views = {tuple(draw_view(images, settings, generator).flatten().tolist()) for _ in range(120)}
    expected = {
        tuple(torch.roll(x, (a, b), (2, 3)).flatten().tolist())
        for x in ((images, images.flip(-1)) if flip else (images,))
        for a in range(jitter + 1)
        for b in range(jitter + 1)
    }
    assert views == expected
    assert len(views) == count


def test_one_view_applies_to_the_whole_batch():
    images = torch.randn(1, 3, 16, 16).expand(4, 3, 16, 16)
    view = draw_view(images, SynthesisView(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(view, view[:1].expand_as(view))


# -- resuming -----------------------------------------------------------------------------------------------------------

STEPS = 12
KINDS = {
    "drawn teachers": {},
    "ladder and clamp off": {"synthesis.clamp": False, "synthesis.lr_schedule": "constant", "teachers.extras": 2},
    "G-VBSM": {
        "teachers.selection": "cycle", "teachers.extras": 3, "synthesis.batch_order": "within_class",
        "synthesis.momentum": 0.4, "synthesis.conv": {"patch": 8, "drop": 0.3}, "synthesis.densification": {"size": 8},
        "synthesis.view": {"curriculum": "cosine"}, "teachers.draw_probability": 0.5,
    },
    "balanced": {"synthesis.bn_reduction": "balanced"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_resumes_from_any_step_with_the_same_bytes(tiny_recipe, teachers, statistics, kind):
    recipe = tiny_recipe({"synthesis.iterations": STEPS, "teachers.draw_probability": 0.5, **KINDS[kind]})
    job = first_job(recipe)
    more = {"statistics": statistics[8] if recipe.synthesis.conv else None}
    states = {step.number: step.state() for step in synthesize(*job, teachers, **more)}
    trace, pixels = run_one(recipe, teachers, **more)
    for number in (1, 4, 10, STEPS):
        again, end = trace_of(synthesize(*job, teachers, **more, state=states[number]), states[number]["pixels"])
        assert again == trace[number:]
        assert torch.equal(end, pixels)


def test_a_state_is_a_copy_that_resuming_does_not_change(tiny_recipe, teachers):
    job = first_job(tiny_recipe({"synthesis.momentum": 0.4}))
    steps = synthesize(*job, teachers)
    state = next(steps).state()
    copies = {key: value.clone() for key, value in state.items()}
    list(steps)
    list(synthesize(*job, teachers, state=state))
    assert {"step", "pixels", "generator", "adam/exp_avg", "averages/test_resnet/bn.0.mean"} <= set(state)
    assert same(state, copies)
    assert not state["pixels"].requires_grad
