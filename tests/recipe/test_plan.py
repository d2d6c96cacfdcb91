import re
import time
from collections import Counter

import pytest
from each import each

from prism_hf.recipe.describe import describe_plan
from prism_hf.recipe.plan import batch_ranges, plan_jobs
from prism_hf.runtime.seeds import derived_seed

WITHIN = {"synthesis.batch_order": "within_class"}


def big(tiny_recipe, classes=7, ipc=5, size=4, **changes):
    base = {"data.num_classes": classes, "synthesis.ipc": ipc, "synthesis.batch_size": size}
    return tiny_recipe(base | {key.replace("__", "."): value for key, value in changes.items()})


@each("size", [2, 3, 4, 5, 6, 7])
@each("order, slots", [("within_class", 1), ("cross_class", 1), ("cross_class", 2), ("cross_class", 5)])
def test_every_image_is_in_exactly_one_job(tiny_recipe, size, order, slots):
    made = big(tiny_recipe, size=size, synthesis__batch_order=order, synthesis__slots_per_batch=slots)
    jobs = plan_jobs(made)
    images = [image for job in jobs for image in zip(job.classes, job.slots, strict=True)]
    assert sorted(images) == [(c, s) for c in range(7) for s in range(5)]
    assert [job.id for job in jobs] == list(range(len(jobs)))
    assert all(2 <= len(job.classes) <= size + 1 for job in jobs)


def test_cross_class_batch_holds_consecutive_classes_of_one_slot(tiny_recipe):
    jobs = plan_jobs(big(tiny_recipe, classes=4, ipc=2, size=2))
    assert [(job.classes, job.slots) for job in jobs] == [
        ((0, 1), (0, 0)),
        ((2, 3), (0, 0)),
        ((0, 1), (1, 1)),
        ((2, 3), (1, 1)),
    ]


def test_cross_class_batch_of_two_slots_keeps_classes_together(tiny_recipe):
    jobs = plan_jobs(big(tiny_recipe, classes=3, ipc=3, size=6, synthesis__slots_per_batch=2))
    assert [(job.classes, job.slots) for job in jobs] == [
        ((0, 0, 1, 1, 2, 2), (0, 1, 0, 1, 0, 1)),
        ((0, 1, 2), (2, 2, 2)),
    ]


def test_within_class_batch_holds_consecutive_slots(tiny_recipe):
    jobs = plan_jobs(big(tiny_recipe, classes=3, ipc=2, size=4, synthesis__batch_order="within_class"))
    assert [(job.classes, job.slots) for job in jobs] == [((0, 0, 1, 1), (0, 1, 0, 1)), ((2, 2), (0, 1))]


@each(
    "count, size, lengths",
    [(6, 3, [3, 3]), (7, 3, [3, 4]), (8, 3, [3, 3, 2]), (3, 2, [3]), (2, 5, [2]), (1, 5, [1]), (4, 4, [4])],
)
def test_a_single_remaining_image_joins_the_previous_batch(count, size, lengths):
    ranges = batch_ranges(count, size)
    assert [len(r) for r in ranges] == lengths
    assert [i for r in ranges for i in r] == list(range(count))


def test_seeds_differ_per_job_and_recipe_seed(tiny_recipe):
    seeds = [job.seed for seed in (0, 1) for job in plan_jobs(big(tiny_recipe, seed=seed))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seed_is_pinned():
    # The guarantee is "the same on every machine and Python version", so the test pins the number.
    assert derived_seed(0, "job", 0) == 2902376216969448531
    assert derived_seed("a", "b") != derived_seed("b", "a")


def test_plan_is_the_same_twice(tiny_recipe):
    assert plan_jobs(big(tiny_recipe)) == plan_jobs(big(tiny_recipe))


POOL = {"teachers.bn_pool": ["a", "b", "c"], "teachers.extras": 3, "teachers.draw_probability": 0.5}


def test_per_slot_draw_is_shared_by_all_jobs_and_iterations_of_a_slot(tiny_recipe):
    jobs = plan_jobs(tiny_recipe(POOL | {"data.num_classes": 6, "synthesis.ipc": 8, "synthesis.batch_size": 2}))
    draws = {}
    for job in jobs:
        draws.setdefault(job.slots[0], set()).update(job.bn_teachers(i) for i in range(5))
    assert all(len(found) == 1 for found in draws.values())
    assert len({next(iter(found)) for found in draws.values()}) > 1


def test_per_iteration_draws_differ_between_iterations_and_jobs(tiny_recipe):
    jobs = plan_jobs(
        tiny_recipe(POOL | {"teachers.selection": "per_iteration", "data.num_classes": 6, "synthesis.batch_size": 3})
    )
    sequences = [tuple(job.bn_teachers(i) for i in range(20)) for job in jobs]
    assert len(set(sequences)) == len(jobs)
    assert all(len(set(sequence)) > 3 for sequence in sequences)
    assert sequences[0] == tuple(jobs[0].bn_teachers(i) for i in range(20))


def test_draws_change_with_the_recipe_seed(tiny_recipe):
    changes = POOL | {"teachers.selection": "per_iteration"}
    a, b = (plan_jobs(tiny_recipe(changes | {"seed": seed}))[0] for seed in (0, 1))
    assert [a.bn_teachers(i) for i in range(20)] != [b.bn_teachers(i) for i in range(20)]


def test_half_of_the_draws_succeed_and_are_uniform(tiny_recipe):
    job = plan_jobs(tiny_recipe(POOL | {"teachers.selection": "per_iteration"}))[0]
    drawn = [job.bn_teachers(i)[1:] for i in range(3000)]
    counts = Counter(name for draw in drawn for name in draw)
    sizes = Counter(map(len, drawn))
    assert all(len(set(draw)) == len(draw) for draw in drawn)
    assert all(abs(counts[name] / 3000 - 0.5) < 0.03 for name in "abc")
    assert all(abs(sizes[k] / 3000 - p) < 0.03 for k, p in enumerate([1 / 8, 3 / 8, 3 / 8, 1 / 8]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teachers.draw_probability": 1.0}, {"test_resnet", "a", "b", "c"}),
        ({"teachers.draw_probability": 0.0}, {"test_resnet"}),
        ({"teachers.extras": 0}, {"test_resnet"}),
        ({"teachers.draw_probability": 1.0, "teachers.include_logit": False}, {"a", "b", "c"}),
        ({"teachers.draw_probability": 1.0, "teachers.bn_pool": ["a"]}, {"test_resnet", "a"}),
        ({"teachers.bn_pool": []}, {"test_resnet"}),
        ({"teachers.draw_probability": 1.0, "teachers.logit": "d"}, {"d", "a", "b", "c"}),
    ],
)
def test_draw_uses_the_teachers_in_each_pool(tiny_recipe, changes, expected):
    names = plan_jobs(tiny_recipe(POOL | changes))[0].bn_teachers(0)
    assert set(names) == expected
    assert len(names) == len(expected)


CYCLE = {"teachers.bn_pool": ["a", "b", "c"], "teachers.selection": "cycle", "teachers.extras": 3,
         "teachers.draw_probability": 0.5}  # fmt: skip
RANDOM = {"method": "random", "synthesis": {"ipc": 4}, "teachers": {"logit": "test_resnet", "verifier": "v"}}


def test_with_cycle_teachers_alternate_in_every_job(tiny_recipe):
    jobs = plan_jobs(tiny_recipe(CYCLE | {"synthesis.iterations": 9}))
    assert len(jobs) == 2
    for job in jobs:
        assert [job.logit_teacher(i) for i in range(9)] == ["test_resnet", "a", "b", "c"] * 2 + ["test_resnet"]
        assert all(job.bn_teachers(i) == (job.logit_teacher(i),) for i in range(9))


@pytest.mark.parametrize("selection", ["per_slot", "per_iteration"])
def test_without_cycle_the_logit_teacher_is_fixed(tiny_recipe, selection):
    job = plan_jobs(tiny_recipe(POOL | {"teachers.selection": selection}))[0]
    assert {job.logit_teacher(i) for i in range(20)} == {"test_resnet"}


def test_method_random_is_one_job_without_steps(tiny_recipe):
    (job,) = plan_jobs(tiny_recipe(RANDOM))
    assert (job.id, job.iterations) == (0, 0)
    assert list(zip(job.classes, job.slots, strict=True)) == [(c, s) for c in range(3) for s in range(4)]


@pytest.mark.parametrize("extras", [1, 2])
def test_extras_limits_the_number_of_drawn_teachers(tiny_recipe, extras):
    job = plan_jobs(tiny_recipe(POOL | {"teachers.extras": extras, "teachers.draw_probability": 1.0}))[0]
    assert len(job.bn_teachers(0)) == 1 + extras


def test_a_draw_of_few_teachers_does_not_shift_the_next_draw(tiny_recipe):
    changes = POOL | {"teachers.selection": "per_iteration"}
    one, three = (plan_jobs(tiny_recipe(changes | {"teachers.extras": extras}))[0] for extras in (1, 3))
    assert all(three.bn_teachers(i)[: len(one.bn_teachers(i))] == one.bn_teachers(i) for i in range(50))


@pytest.mark.parametrize(
    ("ladder", "iterations"),
    [
        (None, [9, 9, 9, 9, 9]),
        ({"step": 2, "period": 3}, [9, 7, 5, 9, 7]),
        ({"step": 1, "period": 3}, [9, 8, 7, 9, 8]),
        ({"step": 2, "period": 2}, [9, 7, 9, 7, 9]),
    ],
)
def test_ladder_gives_later_slots_fewer_iterations(tiny_recipe, ladder, iterations):
    jobs = plan_jobs(big(tiny_recipe, classes=4, size=4, synthesis__iterations=9, synthesis__ladder=ladder))
    assert [job.iterations for job in jobs] == iterations


def lines_of(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines() if not line.startswith("BN")}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 3}, "tiny"),
        ({"data.size": 48}, "data"),
        ({"synthesis.ipc": 4}, "images"),
        ({"synthesis.init": "real_index"}, "images"),
        ({"synthesis.batch_size": 2, "data.num_classes": 4}, "jobs"),
        (WITHIN, "jobs"),
        ({"synthesis.iterations": 5}, "steps"),
        ({"synthesis.ladder": {"step": 1, "period": 2}}, "steps"),
        ({"teachers.logit": "resnet18"}, "logit"),
        ({"teachers.verifier": "resnet18"}, "verifier"),
        ({"relabel.teachers": ["resnet18"]}, "relabel"),
        ({"relabel.ensemble": "mean"}, "relabel"),
        ({"relabel.epochs": 3}, "relabel"),
        ({"relabel.epochs": 3}, "bytes"),
        ({"teachers.logit": "squeeze:resnet18"}, "squeeze"),
        ({"evaluation.student": "resnet18"}, "students"),
        ({"evaluation.seeds": [0]}, "students"),
        ({"packaging.image_format": "webp"}, "bytes"),
        (CYCLE, "logit"),
        (RANDOM, "logit"),
        (RANDOM, "images"),
        (RANDOM, "steps"),
    ],
)
def test_description_reflects_each_change(tiny_recipe, changes, line):
    base, changed = lines_of(describe_plan(tiny_recipe())), lines_of(describe_plan(tiny_recipe(changes)))
    assert base[line] != changed[line]


def test_description_counts_the_draws(tiny_recipe):
    made = tiny_recipe(POOL | {"synthesis.iterations": 11})
    jobs = plan_jobs(made)
    counts = Counter(name for job in jobs for i in range(job.iterations) for name in job.bn_teachers(i))
    text = describe_plan(made)
    assert "steps     22 in total (66 image-iterations)" in text
    for name in made.teachers.synthesis_names:
        assert f"BN        {name}: in {counts[name]} of 22 steps" in text


@each(
    "extras, probability, pool, percent",
    [(3, 0.5, 3, 50), (3, 0.5, 4, 38), (3, 1.0, 4, 75), (5, 0.5, 1, 97), (1, 0.3, 2, 15), (2, 0.0, 2, 0), (0, 0.5, 2, 0)],
)
def test_description_expects_the_draws_of_each_iteration(tiny_recipe, extras, probability, pool, percent):
    """5 draws with probability 0.5 each fill a pool of one teacher in 1 - 0.5**5 of the steps."""
    rule = {"extras": extras, "draw_probability": probability, "bn_pool": list("abcd"[:pool]), "selection": "per_iteration"}
    made = tiny_recipe({f"teachers.{key}": value for key, value in rule.items()} | {"synthesis.iterations": 1000})
    job = plan_jobs(made)[0]
    counts = Counter(name for i in range(1000) for name in job.bn_teachers(i))
    assert all(abs(counts[name] / 1000 - percent / 100) < 0.05 for name in "abcd"[:pool])
    told = re.findall(r"BN        [abcd]: in (about )?([\d,]+) of 2,000 steps \((\d+)%\)", describe_plan(made))
    assert [(bool(about), int(share)) for about, _, share in told] == [(percent > 0, percent)] * pool


def test_ten_million_images_are_planned_in_little_time_and_memory(tiny_recipe):
    """100,000 jobs of 100 images, of which those of a slot share their tuples. A tenth of them is planned here."""
    sizes = {"data.num_classes": 1000, "synthesis.ipc": 1000, "synthesis.batch_size": 100}
    made = tiny_recipe(POOL | sizes | {"teachers.selection": "per_iteration", "synthesis.iterations": 4000})
    jobs = plan_jobs(made)
    assert len(jobs) == 10_000
    assert len({id(values) for job in jobs for values in (job.classes, job.slots)}) == 10 + 1000
    started = time.process_time()
    assert "in about 20,000,000 of 40,000,000 steps (50%)" in describe_plan(made)
    assert time.process_time() - started < 5, "40 million draws take minutes"


def test_description_of_a_cycle_counts_the_turns(tiny_recipe):
    text = describe_plan(tiny_recipe(CYCLE | {"synthesis.iterations": 6}))
    assert "logit     each teacher in turn" in text
    turns = [line.split(":")[1] for line in text.splitlines() if line.startswith("BN")]
    assert turns == [f" in {count} of 12 steps ({count / 12:.0%})" for count in (4, 4, 2, 2)]


@pytest.mark.parametrize(
    "changes", [RANDOM, {"synthesis.iterations": 0, "synthesis.init": "real_random"}], ids=["random", "no iterations"]
)
def test_description_of_recipes_that_do_not_optimize(tiny_recipe, changes):
    text = describe_plan(tiny_recipe(changes))
    assert "steps     0 in total (0 image-iterations)" in text
    assert "\nBN " not in text
    assert ("real images drawn at random" in text) == ("method" in changes)
    assert ("logit     none" in text) == ("method" in changes)


def test_one_thing_is_not_called_several(tiny_recipe):
    one = {"relabel.epochs": 1, "evaluation.seeds": (0,)}
    text = describe_plan(tiny_recipe(one))
    assert not re.search(r"\b1 (images|epochs|seeds|steps|jobs)\b", text), text
    for words in ("1 epoch of views", ", 1 seed\n"):
        assert words in text
