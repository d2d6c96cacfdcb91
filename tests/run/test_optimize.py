import copy
import dataclasses

import pytest
import torch
from conftest import make_teacher
from job_starts import DENSE, TWO_SLOTS, first_job, start
from pipeline import mtimes
from slow_statistics import gathered

from prism_hf.errors import NotFiniteError, StoppedError, SynthesisError
from prism_hf.images.pixels import reference_mean_std, to_uint8
from prism_hf.method import synthesis
from prism_hf.method.objective import Objective
from prism_hf.run.optimize import CHECK_EVERY, history_tensors, optimize, ratio_lines, ratios_in, term_ratios
from prism_hf.runtime import stop as interruption
from prism_hf.runtime.checkpoint import Checkpoint
from prism_hf.runtime.store import Artifact


def run_one(recipe, teachers, initial=None, **more):
    job, settings, noise = first_job(recipe)
    return optimize(job, settings, noise if initial is None else initial, teachers, **more)


@pytest.fixture(scope="module")
def teachers(tiny_teachers, tiny_verifier):
    return {**tiny_teachers, "verifier": tiny_verifier}


def test_with_no_iterations_the_start_images_are_the_result(tiny_recipe, teachers, tiny_verifier):
    made = tiny_recipe({"synthesis.iterations": 0, "synthesis.init": "real_random", "teachers.bn_pool": []})
    initial = start(made)[:, 0].clone()
    result = run_one(made, teachers, initial, verifier=tiny_verifier)
    assert torch.equal(result.images_uint8, to_uint8(initial))
    assert result.history == []
    assert 0 <= result.logit_top1 <= 1
    assert 0 <= result.verifier_top1 <= 1


def test_the_history_contains_densification(tiny_recipe, teachers):
    (entry,) = run_one(tiny_recipe(TWO_SLOTS | DENSE), teachers).history
    assert [key for key in entry if not key.startswith("ratio ")] == ["step", "ce", "bn", "grad", "densification", "lr"]
    assert entry["densification"] > 0


def test_history_names_its_terms(tiny_recipe, teachers):
    seen = []
    made = tiny_recipe({"synthesis.iterations": CHECK_EVERY + 3})
    result = run_one(made, teachers, on_check=seen.append)
    assert result.history == seen
    assert [entry["step"] for entry in seen] == [CHECK_EVERY, CHECK_EVERY + 3]
    terms = {"step", "ce", "bn", "grad", "lr"}
    assert [set(entry) - terms for entry in seen][1:] == [set()]
    ratios = ratios_in(seen[0])
    assert ratios_in(seen[1]) == {}
    assert set(seen[0]) - terms == {f"ratio {name}" for name in ratios}
    # The BN term is the mean over the teachers of the step.
    mean = sum(ratios.values()) / len(ratios)
    assert mean == pytest.approx(made.synthesis.bn_weight * seen[0]["bn"] / seen[0]["ce"], rel=1e-4)


def test_teachers_that_take_turns_are_all_reported(tiny_recipe, teachers):
    """With `cycle`, every step has one teacher, and a look comes every ten steps."""
    draws = {"teachers.extras": 3, "teachers.draw_probability": 0.5}  # the defaults: nothing is drawn
    made = tiny_recipe({"teachers.selection": "cycle", "synthesis.iterations": CHECK_EVERY} | draws)
    (entry,) = run_one(made, teachers).history
    assert set(ratios_in(entry)) == set(made.teachers.synthesis_names)
    assert len(made.teachers.synthesis_names) > 1


def test_a_history_becomes_one_tensor_per_value():
    history = [{"step": 10, "ce": 0.1, "ratio a": 3.0}, {"step": 13, "ce": 1 / 3, "verifier_top1": 0.5}]
    tensors = history_tensors(history)
    assert {key: value.tolist() for key, value in tensors.items() if key != "history/verifier_top1"} == {
        "history/step": [10.0, 13.0],
        "history/ce": [0.1, 1 / 3],
    }
    assert tensors["history/verifier_top1"].isnan().tolist() == [True, False]
    assert history_tensors([]) == {}


def test_a_term_that_rules_gets_one_line_of_advice():
    # A job of an earlier version has a history in its notes instead.
    notes = [{"ratios": {"a": 85.0, "b": 2.0}}, {"ratios": {"b": 4.0}}, {"ratios": {}}, {"history": [{"ratio b": 9.0}]}]
    ratios = term_ratios(notes)
    assert ratios == {"a": 85.0, "b": 3.0}
    first, advice = ratio_lines(ratios, 0.01)
    assert first == "weighted BN term / classification loss at the first look: a 85, b 3"
    assert advice.startswith("warning: one term rules for a; with synthesis.bn_weight=0.00012 both would be equal")
    assert len(ratio_lines({"a": 0.001}, 0.01)) == 2
    assert ratio_lines({}, 0.01) == []


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
            1,  # the loss is finite, but its gradient is not
        ),
    ],
)
def test_the_error_for_a_non_finite_loss_names_job_and_iteration(tiny_recipe, teachers, changes, step):
    with pytest.raises(SynthesisError, match=rf"job 0, iteration {step}: not finite \(ce .*Lower synthesis.lr"):
        run_one(tiny_recipe(changes), teachers)


def test_a_broken_initial_image_is_detected_at_once(tiny_recipe, teachers):
    made = tiny_recipe({"synthesis.iterations": 12})
    job, settings, initial = first_job(made, 1)
    initial[1, 0, 3, 3] = float("nan")
    with pytest.raises(SynthesisError, match=r"job 1, iteration 1: not finite \(ce nan"):
        optimize(job, settings, initial, teachers)


def test_the_error_for_a_late_non_finite_loss_names_the_exact_iteration(tiny_recipe, teachers):
    broken = dataclasses.replace(teachers["test_resnet"], model=copy.deepcopy(teachers["test_resnet"].model))
    calls = []

    def poison(_module, _inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 14 else output

    broken.model.register_forward_hook(poison)
    made = tiny_recipe({"synthesis.iterations": 30, "teachers.bn_pool": []})
    with pytest.raises(SynthesisError, match="job 0, iteration 14"):
        run_one(made, {"test_resnet": broken})
    assert len(calls) == 20  # found at the next check, not at the end


def test_the_out_of_memory_error_says_to_lower_the_batch_size(tiny_recipe, teachers):
    full = dataclasses.replace(teachers["test_resnet"], model=copy.deepcopy(teachers["test_resnet"].model))

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    full.model.register_forward_pre_hook(fail)
    with pytest.raises(
        SynthesisError,
        match="job 0: a batch of 3 images and teachers test_resnet: out of memory.*lower synthesis.batch_size",
    ):
        run_one(tiny_recipe({"teachers.bn_pool": []}), {"test_resnet": full})


def test_the_verifier_is_logged_and_does_not_change_the_result(tiny_recipe, teachers, tiny_verifier):
    made = tiny_recipe({"synthesis.iterations": 20, "synthesis.verify_every": 10})
    with_, without = run_one(made, teachers, verifier=tiny_verifier), run_one(made, teachers)
    assert torch.equal(with_.images_uint8, without.images_uint8)
    assert [{k: v for k, v in e.items() if k != "verifier_top1"} for e in with_.history] == without.history
    assert all("verifier_top1" in entry for entry in with_.history)
    assert with_.history[-1]["verifier_top1"] == with_.verifier_top1
    assert without.verifier_top1 is None


@pytest.mark.parametrize(("every", "steps"), [(10, [10, 20, 30]), (15, [20, 30]), (25, [30]), (30, [30]), (1000, [30])])
def test_verify_every_sets_when_the_verifier_runs(tiny_recipe, teachers, tiny_verifier, every, steps):
    made = tiny_recipe({"synthesis.iterations": 30, "synthesis.verify_every": every, "teachers.bn_pool": []})
    history = run_one(made, teachers, verifier=tiny_verifier).history
    # Steps 15 and 25 fall between two checks of the losses: the verifier runs at the next check, and always at the end.
    assert [e["step"] for e in history if "verifier_top1" in e] == steps


def test_verify_every_applies_to_a_short_run(tiny_recipe, teachers, tiny_verifier):
    changes = {"synthesis.verify_every": 100, "teachers.bn_pool": []}
    asked = []
    for iterations in (5, 15):
        made = tiny_recipe(changes | {"synthesis.iterations": iterations})
        asked.append("verifier_top1" in run_one(made, teachers, verifier=tiny_verifier).history[-1])
    assert asked[0] == asked[1]


def test_the_result_has_the_optimized_pixels(tiny_recipe, teachers):
    # With a learning rate near zero the image does not change, so the result is the rounded start image.
    made = tiny_recipe({"synthesis.lr": 1e-9})
    initial = start(made)[:, 0].clamp(-1.5, 1.5)
    mean, std = reference_mean_std(3)
    expected = ((initial * std + mean) * 255).round().to(torch.uint8)
    difference = run_one(made, teachers, initial).images_uint8.int() - expected.int()
    assert int(difference.abs().max()) <= 1
    assert int((difference != 0).sum()) <= 2


def test_the_result_has_the_shape_of_the_input_which_is_not_modified(tiny_recipe, teachers):
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


def test_a_non_finite_pixel_is_detected_despite_finite_losses(tiny_recipe, teachers):
    changes = {"synthesis.lr": 1e38, "synthesis.bn_weight": 1e4, "synthesis.clamp": False, "synthesis.iterations": 1}
    with pytest.raises(NotFiniteError, match="job 0, iteration 1: a pixel is not finite. Lower synthesis.lr"):
        run_one(tiny_recipe(changes), teachers)


def test_the_logit_teacher_scores_the_resulting_images(tiny_recipe, teachers):
    recipe, order = tiny_recipe({"teachers.bn_pool": []}), []
    handle = teachers["test_resnet"].model.register_forward_hook(lambda _m, _i, output: order.append(output))
    try:
        result = run_one(recipe, teachers)
    finally:
        handle.remove()
    assert len(order) == recipe.synthesis.iterations + 1
    assert result.logit_top1 == float((order[-1].argmax(1) == torch.arange(3)).float().mean())


# -- resuming from a checkpoint ----------------------------------------------------------------------------------------

STEPS = 12
KINDS = {
    "drawn teachers": {},
    "G-VBSM": {
        "teachers.selection": "cycle", "teachers.extras": 3, "synthesis.batch_order": "within_class",
        "synthesis.momentum": 0.4, "synthesis.conv": {"patch": 8, "drop": 0.3}, "synthesis.densification": {"size": 8},
    },
}  # fmt: skip


class Killed(BaseException):
    """Stands for the end of the process."""


def job_of(tiny_recipe, changes):
    changes = {"synthesis.iterations": STEPS, "teachers.draw_probability": 0.5, "synthesis.verify_every": 5, **changes}
    return first_job(tiny_recipe(changes))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_job_killed_at_any_step_resumes_with_the_same_bytes(
    tiny_recipe, tiny_teachers, tiny_verifier, tiny_images, tmp_path, monkeypatch, kind
):
    work, more = job_of(tiny_recipe, KINDS[kind]), {"verifier": tiny_verifier}
    if work[1].conv:
        more["statistics"] = {name: gathered(teacher, tiny_images) for name, teacher in tiny_teachers.items()}
    plain = optimize(*work, tiny_teachers, **more)
    # All steps with drawn teachers; else around a check of the losses and after each teacher has had its turn.
    for step in range(STEPS) if kind == "drawn teachers" else (1, 4, 9, 10):
        kept, left = Checkpoint(Artifact(tmp_path / str(step), "key"), 0), [step]

        def backward(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return Objective.backward(*args, **kwargs)

        killing = type("Killing", (Objective,), {"backward": backward})
        with monkeypatch.context() as patched:
            patched.setattr(synthesis, "Objective", killing)
            with pytest.raises(Killed):
                optimize(*work, tiny_teachers, **more, checkpoint=kept)
        found = kept.load()
        assert (found.notes["step"] if found else 0) == step
        again = optimize(*work, tiny_teachers, **more, checkpoint=kept)
        assert torch.equal(again.images_uint8, plain.images_uint8)
        assert again.history == plain.history
        assert (again.logit_top1, again.verifier_top1) == (plain.logit_top1, plain.verifier_top1)


def test_a_job_that_was_asked_to_stop_resumes_with_the_same_bytes(tiny_recipe, tiny_teachers, tmp_path):
    work = job_of(tiny_recipe, {})
    plain = optimize(*work, tiny_teachers)
    kept = Checkpoint(Artifact(tmp_path / "c", "key"))
    handle = tiny_teachers["test_resnet"].model.register_forward_pre_hook(lambda *_: interruption._wanted.set())
    try:
        with pytest.raises(StoppedError):
            optimize(*work, tiny_teachers, checkpoint=kept)
    finally:
        handle.remove()
        interruption._wanted.clear()
    assert kept.load().notes["step"] == 1
    assert torch.equal(optimize(*work, tiny_teachers, checkpoint=kept).images_uint8, plain.images_uint8)


def test_a_finished_job_recomputes_no_step(tiny_recipe, tiny_teachers, tmp_path):
    work, kept, calls = job_of(tiny_recipe, {}), Checkpoint(Artifact(tmp_path / "c", "key"), 0), []
    plain = optimize(*work, tiny_teachers, checkpoint=kept)
    before = mtimes(tmp_path)
    handle = tiny_teachers["test_resnet"].model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = optimize(*work, tiny_teachers, checkpoint=kept)
    handle.remove()
    assert calls == [1], "only the final score is computed"
    assert torch.equal(again.images_uint8, plain.images_uint8)
    assert mtimes(tmp_path) == before


def test_a_job_with_a_non_finite_loss_keeps_its_state(tiny_recipe, tmp_path):
    teacher = make_teacher("test_resnet")
    calls = []

    def poison(_module, _inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 3 else output

    teacher.model.register_forward_hook(poison)
    job, settings, initial = job_of(tiny_recipe, {"teachers.bn_pool": []})
    kept = Checkpoint(Artifact(tmp_path / "c", "key"))
    with pytest.raises(NotFiniteError, match="iteration 3"):
        optimize(job, settings, initial, {"test_resnet": teacher}, checkpoint=kept)
    found = kept.load()
    assert found.notes["step"] == 10
    assert {"pixels", "generator", "losses", "adam/exp_avg"} <= set(found.tensors)
    assert not found.tensors["pixels"].isfinite().all()
