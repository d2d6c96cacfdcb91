import copy
import dataclasses
from collections import Counter

import pytest
import torch

from prism_hf.errors import SynthesisError
from prism_hf.images.pixels import noise, reference_mean_std, to_uint8
from prism_hf.method import synthesis as module
from prism_hf.method.statistics import gather_statistics
from prism_hf.method.synthesis import CHECK_EVERY, crop_range, draw_view, synthesize
from prism_hf.recipe.plan import plan_jobs
from prism_hf.recipe.synthesis import SynthesisView

STILL = {"crop_scale": [1.0, 1.0], "flip": False, "jitter": 0}


def start(recipe, seed=0):
    shape = (
        recipe.data.num_classes,
        recipe.synthesis.ipc,
        recipe.data.channels,
        recipe.data.size,
        recipe.data.size,
    )
    return noise(shape, torch.Generator().manual_seed(seed))


def run_all(recipe, teachers, **more):
    """All jobs: images by (class, slot), and the histories."""
    initial, histories = start(recipe), []
    images = torch.zeros(initial.shape, dtype=torch.uint8)
    for job in plan_jobs(recipe):
        rows = (torch.tensor(job.classes), torch.tensor(job.slots))
        result = synthesize(job, recipe.synthesis, initial[rows], teachers, **more)
        images[rows] = result.images_uint8
        histories.append(result.history)
    return images, histories


def run_one(recipe, teachers, initial=None, **more):
    job = plan_jobs(recipe)[0]
    initial = start(recipe)[torch.tensor(job.classes), torch.tensor(job.slots)] if initial is None else initial
    return synthesize(job, recipe.synthesis, initial, teachers, **more)


LADDER = {"synthesis.ipc": 3, "synthesis.ladder": {"step": 1, "period": 2}}
TWO_SLOTS = {"synthesis.slots_per_batch": 2, "synthesis.batch_size": 6}
CONV = {"synthesis.conv": {"patch": 8}}
DENSE = {"synthesis.densification": {"size": 8}}
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
    """What convolutions see on a handful of images, for two sizes of patch."""

    def gather(patch):
        return {
            name: gather_statistics(teacher, lambda rows: tiny_images[rows], 7, patch=patch, seed=0)
            for name, teacher in teachers.items()
        }

    return {patch: gather(patch) for patch in (4, 8)}


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
def test_every_switch_changes_the_images(outcome, base, change):
    # No seed depends on these fields (but `seed`), so the images differ only because the field is read.
    assert not torch.equal(outcome(base), outcome({**base, **change}))


def test_no_iterations_ship_the_start_images_as_they_are(tiny_recipe, teachers, tiny_verifier):
    made = tiny_recipe({"synthesis.iterations": 0, "synthesis.init": "real_random", "teachers.bn_pool": []})
    initial = start(made)[:, 0].clone()
    result = run_one(made, teachers, initial, verifier=tiny_verifier)
    assert torch.equal(result.images_uint8, to_uint8(initial))
    assert result.history == []
    assert 0 <= result.logit_top1 <= 1
    assert 0 <= result.verifier_top1 <= 1


@pytest.mark.parametrize("ends", [(0.08, 1.0), (0.3, 0.6)])
def test_the_curriculum_goes_from_the_largest_crop_to_the_whole_range(ends):
    plain, course = (SynthesisView(crop_scale=ends, curriculum=rule) for rule in ("none", "cosine"))
    assert all(crop_range(plain, progress) == ends for progress in (0.0, 0.5, 1.0))
    assert crop_range(course, 0.0) == (ends[1], ends[1])
    assert crop_range(course, 1.0) == pytest.approx(ends)
    assert crop_range(course, 0.5) == pytest.approx((sum(ends) / 2, ends[1]))
    lows = [crop_range(course, n / 20)[0] for n in range(21)]
    assert lows == sorted(lows, reverse=True)


def test_the_curriculum_reaches_both_ends_in_a_job(tiny_recipe, teachers, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "crop_range", lambda view, progress: seen.append(progress) or (1.0, 1.0))
    for iterations in (5, 1):
        run_one(tiny_recipe({"synthesis.iterations": iterations, "teachers.bn_pool": []}), teachers)
    assert seen == [0, 0.25, 0.5, 0.75, 1, 0]


def test_densification_stands_in_the_history(tiny_recipe, teachers):
    (entry,) = run_one(tiny_recipe(TWO_SLOTS | DENSE), teachers).history
    assert list(entry) == ["step", "ce", "bn", "grad", "densification", "lr"]
    assert entry["densification"] > 0


def test_ladder_spares_the_first_slot(outcome):
    plain, ladder = outcome({"synthesis.ipc": 3}), outcome(LADDER)
    assert [torch.equal(plain[:, slot], ladder[:, slot]) for slot in range(3)] == [True, False, True]


def test_a_job_gives_the_same_bytes_twice(tiny_recipe, teachers, outcome):
    images, histories = run_all(tiny_recipe(), teachers)
    assert torch.equal(images, outcome({}))
    assert histories == run_all(tiny_recipe(), teachers)[1]


def test_a_job_does_not_depend_on_the_jobs_before_it_nor_touch_global_randomness(tiny_recipe, teachers, outcome):
    made, initial = tiny_recipe(), start(tiny_recipe())
    job = plan_jobs(made)[-1]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    result = synthesize(job, made.synthesis, initial[list(job.classes), list(job.slots)], teachers)
    assert torch.equal(result.images_uint8, outcome({})[list(job.classes), list(job.slots)])
    assert torch.equal(torch.get_rng_state(), before)


def test_result_is_shaped_like_the_input_which_is_left_alone(tiny_recipe, teachers):
    initial = start(tiny_recipe())[:, 0].contiguous()
    before = initial.clone()
    result = run_one(tiny_recipe(), teachers, initial)
    assert torch.equal(initial, before)
    assert not initial.requires_grad
    assert result.images_uint8.shape == initial.shape
    assert result.images_uint8.dtype == torch.uint8
    assert result.images_uint8.is_contiguous()
    assert 0 <= result.logit_top1 <= 1
    assert result.verifier_top1 is None


def test_grey_images_work_with_teachers_of_three_channels(tiny_recipe, teachers):
    assert run_one(tiny_recipe({"data.channels": 1}), teachers).images_uint8.shape == (3, 1, 32, 32)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_both_terms_fall(tiny_recipe, teachers, reduction):
    weight = 0.01 if reduction == "sum" else 0.3
    changes = {"synthesis.view": STILL, "synthesis.bn_weight": weight, "synthesis.bn_reduction": reduction}
    first = run_one(tiny_recipe(changes | {"synthesis.iterations": 1}), teachers).history[0]
    last = run_one(tiny_recipe(changes | {"synthesis.iterations": 40}), teachers).history[-1]
    assert last["ce"] < 0.8 * first["ce"]
    assert last["bn"] < 0.95 * first["bn"]


def test_history_names_its_terms(tiny_recipe, teachers):
    seen = []
    made = tiny_recipe({"synthesis.iterations": CHECK_EVERY + 3})
    result = run_one(made, teachers, on_check=seen.append)
    assert result.history == seen
    assert [entry["step"] for entry in seen] == [CHECK_EVERY, CHECK_EVERY + 3]
    assert all(set(entry) == {"step", "ce", "bn", "grad", "lr"} for entry in seen)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate_follows_its_schedule(tiny_recipe, teachers, schedule):
    made = tiny_recipe({"synthesis.iterations": 20, "synthesis.lr_schedule": schedule, "teachers.bn_pool": []})
    rates = [entry["lr"] for entry in run_one(made, teachers).history]
    expected = [0.05 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 20))) for step in (9, 19)]
    assert rates == pytest.approx([0.05, 0.05] if schedule == "constant" else [float(e) for e in expected], rel=1e-5)


@pytest.mark.parametrize("clamp", [True, False])
def test_clamp_keeps_pixels_in_the_valid_range_during_optimisation(tiny_recipe, teachers, clamp):
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


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"synthesis.lr": 1e30, "synthesis.clamp": False}, 2),
        ({"synthesis.lr": 1e30, "synthesis.clamp": False, "synthesis.iterations": 25}, 2),
        (
            {
                "synthesis.bn_weight": 1e38,
                "synthesis.lr": 1e38,
                "synthesis.clamp": False,
                "synthesis.iterations": 3,
            },
            1,  # the loss is finite there, its gradient is not
        ),
    ],
)
def test_a_loss_that_is_not_finite_names_job_and_iteration(tiny_recipe, teachers, changes, step):
    with pytest.raises(SynthesisError, match=rf"job 0, iteration {step}: not finite \(ce .*Lower synthesis.lr"):
        run_one(tiny_recipe(changes), teachers)


def test_a_broken_initial_image_is_found_at_once(tiny_recipe, teachers):
    made = tiny_recipe({"synthesis.iterations": 12})
    job, initial = plan_jobs(made)[1], start(made)[:, 1].clone()
    initial[1, 0, 3, 3] = float("nan")
    with pytest.raises(SynthesisError, match=r"job 1, iteration 1: not finite \(ce nan"):
        synthesize(job, made.synthesis, initial, teachers)


def test_a_loss_that_breaks_late_names_the_exact_iteration(tiny_recipe, teachers):
    broken = dataclasses.replace(teachers["test_resnet"], model=copy.deepcopy(teachers["test_resnet"].model))
    calls = []

    def poison(_module, _inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 14 else output

    broken.model.register_forward_hook(poison)
    made = tiny_recipe({"synthesis.iterations": 30, "teachers.bn_pool": []})
    with pytest.raises(SynthesisError, match="job 0, iteration 14"):
        run_one(made, {"test_resnet": broken})
    assert len(calls) == 20  # found at the next look, not at the end


def test_out_of_memory_says_that_the_batch_is_not_shrunk(tiny_recipe, teachers):
    full = dataclasses.replace(teachers["test_resnet"], model=copy.deepcopy(teachers["test_resnet"].model))

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    full.model.register_forward_pre_hook(fail)
    with pytest.raises(
        SynthesisError,
        match="job 0: a batch of 3 images and teachers test_resnet: out of memory.*lower synthesis.batch_size",
    ):
        run_one(tiny_recipe({"teachers.bn_pool": []}), {"test_resnet": full})


def test_verifier_is_logged_and_changes_no_byte(tiny_recipe, teachers, tiny_verifier):
    made = tiny_recipe({"synthesis.iterations": 20, "synthesis.verify_every": 10})
    with_, without = run_one(made, teachers, verifier=tiny_verifier), run_one(made, teachers)
    assert torch.equal(with_.images_uint8, without.images_uint8)
    assert [{k: v for k, v in e.items() if k != "verifier_top1"} for e in with_.history] == without.history
    assert all("verifier_top1" in entry for entry in with_.history)
    assert with_.history[-1]["verifier_top1"] == with_.verifier_top1
    assert without.verifier_top1 is None


@pytest.mark.parametrize(("every", "steps"), [(10, [10, 20, 30]), (15, [20, 30]), (25, [30]), (30, [30]), (1000, [30])])
def test_verify_every_says_when_the_verifier_is_asked(tiny_recipe, teachers, tiny_verifier, every, steps):
    made = tiny_recipe({"synthesis.iterations": 30, "synthesis.verify_every": every, "teachers.bn_pool": []})
    history = run_one(made, teachers, verifier=tiny_verifier).history
    # 15 and 25 fall between looks at the losses: asked at the first look after; and always at the end.
    assert [e["step"] for e in history if "verifier_top1" in e] == steps


def test_a_short_run_keeps_to_verify_every(tiny_recipe, teachers, tiny_verifier):
    changes = {"synthesis.verify_every": 100, "teachers.bn_pool": []}
    asked = []
    for iterations in (5, 15):
        made = tiny_recipe(changes | {"synthesis.iterations": iterations})
        asked.append("verifier_top1" in run_one(made, teachers, verifier=tiny_verifier).history[-1])
    assert asked[0] == asked[1]


def test_with_an_empty_s_only_the_logit_teacher_counts(tiny_recipe, teachers):
    empty = {"teachers.include_logit": False, "teachers.draw_probability": 0.0}
    result = run_one(tiny_recipe(empty), teachers)
    assert all(entry["bn"] == 0 for entry in result.history)
    assert torch.equal(
        result.images_uint8, run_one(tiny_recipe(empty | {"synthesis.bn_weight": 9.0}), teachers).images_uint8
    )
    assert torch.equal(result.images_uint8, run_one(tiny_recipe({"synthesis.bn_weight": 0.0}), teachers).images_uint8)


@pytest.mark.parametrize("selection", ["per_slot", "per_iteration", "cycle"])
def test_teachers_run_as_they_are_drawn(tiny_recipe, teachers, selection):
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
    assert order == [*drawn, "test_resnet"]  # the last one scores the shipped images
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


def test_one_view_serves_the_whole_batch():
    images = torch.randn(1, 3, 16, 16).expand(4, 3, 16, 16)
    view = draw_view(images, SynthesisView(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(view, view[:1].expand_as(view))


def test_shipped_pixels_are_the_optimised_ones(tiny_recipe, teachers):
    # With a learning rate of almost nothing the image stays, so what ships is the rounded start.
    made = tiny_recipe({"synthesis.lr": 1e-9})
    initial = start(made)[:, 0].clamp(-1.5, 1.5)
    mean, std = reference_mean_std(3)
    expected = ((initial * std + mean) * 255).round().to(torch.uint8)
    difference = run_one(made, teachers, initial).images_uint8.int() - expected.int()
    assert int(difference.abs().max()) <= 1
    assert int((difference != 0).sum()) <= 2
