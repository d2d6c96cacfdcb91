import copy
import json

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each import each
from PIL import Image
from pipeline import one_line
from torch import nn

from prism_hf.errors import RecipeError
from prism_hf.images.source import ImageSplit
from prism_hf.models.build import build_network, seeded
from prism_hf.models.training import CHECK_EVERY, Batches, Top1, _Training, check_optimizer, fit, known_optimizers, score
from prism_hf.runtime.checkpoint import State

CPU = torch.device("cpu")


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def batches(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn((6, 3, 8, 8), generator=generator), torch.arange(6) % 3


def no_gradient(logits, labels):
    return logits.sum() * 0


def test_seeded_has_an_effect_only_inside_the_block():
    before = torch.get_rng_state()
    with seeded(5, CPU):
        a = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    with seeded(5, CPU):
        assert torch.equal(torch.rand(3), a)
    with seeded(6, CPU):
        assert not torch.equal(torch.rand(3), a)


def test_seeded_restores_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(TypeError), seeded(5, CPU):
        torch.rand("three")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "channels"), [("test_resnet", 3), ("test_efficientnet", 1), ("test_vit", 3)])
def test_build_network_has_the_requested_classes_and_channels(name, channels):
    size = 160 if name == "test_vit" else 32
    built = build_network(name, num_classes=5, channels=channels).eval()
    with torch.no_grad():
        assert built(torch.randn(2, channels, size, size)).shape == (2, 5)


def test_build_network_from_a_transformers_family():
    built = build_network("transformers:mobilenet_v1", num_classes=4, channels=1).eval()
    with torch.no_grad():
        assert built(torch.randn(2, 1, 32, 32)).shape == (2, 4)


@pytest.mark.parametrize(
    "name",
    [
        "resnet_nineteen",
        "transformers:no_such_family",
        pytest.param("transformers:bert"),
        pytest.param("hf-hub:a/b"),
    ],
)
def test_an_unknown_network_gives_a_one_line_error(name):
    with pytest.raises(RecipeError, match="cannot be built") as error:
        build_network(name, num_classes=2, channels=3)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_fit_lowers_the_loss_and_ends_in_eval_mode():
    trained = network()
    data = list(batches(1)) * 60
    loss = nn.functional.cross_entropy
    before = loss(trained(data[0][0]), data[0][1]).item()
    result = fit(trained, data, loss, steps=60, lr=0.05, weight_decay=0.0)
    assert result is trained
    assert not result.training
    assert loss(result.train()(data[0][0]), data[0][1]).item() < 0.7 * before


def test_fit_is_reproducible():
    a, b = (fit(network(), batches(4), nn.functional.cross_entropy, steps=4, lr=0.01, weight_decay=0.1) for _ in "ab")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_weight_decay_follows_the_cosine_and_spares_one_dimensional_parameters():
    start = network()
    ended = fit(copy.deepcopy(start), batches(5), no_gradient, steps=5, lr=0.1, weight_decay=0.2)
    rates = [0.1 * 0.5 * (1 + np.cos(np.pi * step / 5)) for step in range(5)]
    factor = float(np.prod([1 - 0.2 * rate for rate in rates]))
    for before, after in zip(start.parameters(), ended.parameters(), strict=True):
        torch.testing.assert_close(after, before * factor if before.ndim > 1 else before)


def test_one_cycle_warms_up_to_the_peak_and_goes_to_zero():
    rates = []

    def watch(steps):
        trained = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(trained.weight)

        def data():
            last = 1.0
            for _ in range(steps):
                yield torch.ones(1, 1, 1, 1), torch.zeros(1)
                now = float(trained.weight.detach())
                rates.append((1 - now / last) / 0.5)
                last = now

        fit(trained, data(), no_gradient, steps=steps, lr=0.1, weight_decay=0.5, schedule="one_cycle")

    watch(20)
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1, rel=0.02)
    assert 0 < peak < 10
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.001


@pytest.mark.parametrize("ema", [0.15, 0.9])
def test_ema_is_the_moving_average_of_the_weights(ema):
    trained, seen = network(), []
    start = [v.clone() for v in trained.state_dict().values()]

    def watched():
        for batch in batches(4):
            seen.append([v.clone() for v in trained.state_dict().values()])
            yield batch

    result = fit(trained, watched(), nn.functional.cross_entropy, steps=4, lr=0.05, weight_decay=0.0, ema=ema)
    seen = [*seen[1:], [v.clone() for v in trained.state_dict().values()]]
    average = start
    for step, state in enumerate(seen):
        decay = min(ema, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * v if v.is_floating_point() else v for a, v in zip(average, state, strict=True)]
    assert result is not trained
    for ours, expected in zip(result.state_dict().values(), average, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.fixture(scope="module")
def split():
    levels = np.random.default_rng(0).integers(0, 256, 21)
    pictures = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in levels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    labels = [int(level > 60) for level in levels]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    made = ImageSplit(rows, image_column="image", label_column="label", size=8, channels=1, name="test")
    return made, float(np.mean([(level / 255 > 0.449) == label for level, label in zip(levels, labels, strict=True)]))


@pytest.mark.parametrize("batch_size", [4, 21, 256])
def test_score_is_the_fraction_of_correct_predictions(split, batch_size):
    def logits(images):
        mean = images.mean((1, 2, 3))
        return torch.stack([-mean, mean], dim=1)

    assert 0 < split[1] < 1
    assert score(logits, split[0], device=CPU, batch_size=batch_size) == pytest.approx(split[1])


def test_top1_counts_equal_entries():
    assert Top1(keep_in_memory=True).compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"top1": 0.75}


def test_every_few_steps_the_number_of_finished_steps_is_told():
    torch.manual_seed(0)
    told, network = [], torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    data = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])) for _ in range(23)]
    batches = Batches(lambda done: iter(data[done:]))
    fit(network, batches, torch.nn.functional.cross_entropy, steps=23, lr=0.1, weight_decay=0.0, at_step=told.append)
    assert told == [0, *range(CHECK_EVERY, 23, CHECK_EVERY), 23]


def test_micro_batches_add_up_to_the_gradient_of_the_batch():
    """Without batch norm, the step is that of the whole batch; with it, each micro-batch has its own statistics."""
    images, labels = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3

    def trained(norm, micro_batch):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
        batches = Batches(lambda done: iter([(images.double(), labels)] * (3 - done)))
        fit(network, batches, F.cross_entropy, steps=3, lr=0.01, weight_decay=0.0, micro_batch=micro_batch)
        return network[0].weight.detach()

    torch.testing.assert_close(trained(nn.Identity(), None), trained(nn.Identity(), 3), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(trained(nn.BatchNorm2d(4), None), trained(nn.BatchNorm2d(4), 3), rtol=1e-3)
    assert torch.equal(trained(nn.BatchNorm2d(4), None), trained(nn.BatchNorm2d(4), 7))


def test_a_stretched_cosine_ends_above_zero():
    network = nn.Linear(2, 2)
    rates = []
    for stretch in (1.0, 2.0):
        training = _Training(network, "x", steps=10, lr=1.0, weight_decay=0.0, schedule="cosine", ema=0.0, stretch=stretch)
        for _ in range(10):
            training.scheduler.step()
        rates.append(training.scheduler.get_last_lr()[0])
    assert rates[0] == pytest.approx(0.0, abs=1e-12)
    assert rates[1] == pytest.approx(0.5)


def trained(optimizer, *, stop=None, state=None):
    """Train four steps, from `state` if given; with `stop`, return the state after that step as a checkpoint has it."""
    training = _Training(
        network(), "net", steps=4, lr=1e-3, weight_decay=0.01, schedule="cosine", ema=0.0, optimizer=optimizer
    )
    made = Batches(lambda done: list(batches(4))[done:])
    training.network.train()
    if state is not None:
        training.restore(state, made)
    for images, labels in made:
        training.advance(F.cross_entropy, images, [labels])
        if training.step == stop:
            found = training.state(made)
            return State({key: value.clone() for key, value in found.tensors.items()}, json.loads(json.dumps(found.notes)))
    return training.network.state_dict()


@each("name", known_optimizers())
def test_every_known_optimizer_trains_and_resumes_to_the_same_bits(name):
    check_optimizer(name)
    whole, resumed = trained(name), trained(name, state=trained(name, stop=2))
    before = network().state_dict()
    assert all(bool(value.isfinite().all()) for value in whole.values())
    assert any(not torch.equal(whole[key], before[key]) for key in before if "weight" in key)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("name", ["muonn", "adahessian", "bnbadam", "", "AdamW"])
def test_an_optimizer_that_cannot_be_used_is_refused_in_one_line(name):
    with pytest.raises(RecipeError) as error:
        check_optimizer(name)
    assert repr(name) in one_line(error)


def test_the_known_optimizers_are_many():
    assert {"adamw", "adam", "muon", "lion", "sgd", "lamb"} <= set(known_optimizers())
    assert len(known_optimizers()) > 50
