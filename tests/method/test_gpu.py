"""What only a GPU can show: its kernels compute the same, and a replayed step equals a plain one. Run with `-m gpu`."""

import pytest
import timm
import torch
from job_starts import first_job

from prism_hf.method import synthesize
from prism_hf.method.moments import _gradient, channel_statistics
from prism_hf.models.norms import frozen
from prism_hf.models.teacher import Teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
NAMES = ("test_resnet", "test_efficientnet", "test_byobnet")


@pytest.fixture
def many(tiny_recipe):
    pool = {"teachers.logit": NAMES[0], "teachers.bn_pool": list(NAMES[1:]), "teachers.draw_probability": 0.5}
    return tiny_recipe(pool | {"teachers.extras": 2, "synthesis.iterations": 12, "teachers.selection": "per_iteration"})


def teachers(classes):
    made = {}
    for name in NAMES:
        torch.manual_seed(0)
        model = frozen(timm.create_model(name, num_classes=classes).cuda())
        made[name] = Teacher(name, model, (0.5,) * 3, (0.25,) * 3, 32, classes, name, "none", None, "", None)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_and_gradient_equal_the_formula(dtype):
    torch.manual_seed(0)
    x = (torch.randn(6, 16, 9, 7, device="cuda") * 2 + 3).to(dtype).contiguous(memory_format=torch.channels_last)
    for value, exact in zip(channel_statistics(x), torch.var_mean(x.double(), (0, 2, 3), correction=0)[::-1], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    grad, (scale, offset, slope) = torch.randn_like(x), torch.randn(3, 16, device="cuda")
    scale[:3] = torch.tensor([0.0, 1e-20, -1e-3])
    wide = [value.double().view(1, -1, 1, 1) for value in (scale, offset, slope)]
    exact = wide[1] + wide[2] * x.double() + wide[0] * grad.double()
    found = _gradient(x, grad, scale, offset, slope)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_replayed_step_equals_a_plain_one(many, precision):
    job, settings, initial = first_job(many)
    pixels, losses = {}, {}
    for compile in ("off", "auto"):
        steps = list(synthesize(job, settings, initial.cuda(), teachers(3), precision=precision, compile=compile))
        pixels[compile], losses[compile] = steps[-1].pixels, torch.stack([torch.stack(step.terms[:2]) for step in steps])
    assert len({tuple(row) for row in losses["auto"].tolist()}) == 12  # no step has the losses of another one
    torch.testing.assert_close(losses["auto"], losses["off"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pixels["auto"], pixels["off"], rtol=0, atol=2e-2)


def test_every_pass_of_these_teachers_is_recorded(many, caplog):
    job, settings, initial = first_job(many)
    list(synthesize(job, settings, initial.cuda(), teachers(3)))
    assert "without a CUDA graph" not in caplog.text


def test_a_teacher_that_waits_for_the_gpu_runs_without_a_graph(many, caplog):
    caplog.set_level("INFO")
    job, settings, initial = first_job(many)
    models = teachers(3)
    models[NAMES[0]].model.register_forward_hook(lambda _, __, logits: logits + 0 * logits.sum().item())
    steps = list(synthesize(job, settings, initial.cuda(), models))
    assert len(steps) == 12
    assert bool(steps[-1].pixels.isfinite().all())
    assert f"teacher {NAMES[0]} runs without a CUDA graph" in caplog.text
