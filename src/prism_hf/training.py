"""How a network is trained and scored: one loop for squeezed teachers, students and the full-data ceiling.

Legend: B images, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import datasets
import evaluate
import timm
import torch
from torch import Tensor, nn

from .data import ImageSplit
from .errors import RecipeError
from .pixels import to_reference

Schedule = Literal["cosine", "one_cycle"]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global random state (weight init, dropout) is `seed` inside the block and untouched outside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def build_network(name: str, *, num_classes: int, channels: int) -> nn.Module:
    """A network from scratch: a timm architecture, or `transformers:<model type>` in its default configuration.

    Raises:
        RecipeError: Unknown architecture.
    """
    if name.startswith("transformers:"):
        return _from_transformers(name.removeprefix("transformers:"), num_classes, channels)
    if ":" in name or not timm.is_model(name):
        raise RecipeError(
            f"network {name!r} cannot be built: expected a timm architecture (no weights tag), or transformers:MODEL_TYPE"
        )
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=channels)
    except (RuntimeError, TypeError) as error:
        raise RecipeError(f"network {name!r} cannot be built: {' '.join(str(error).split())[:200]}") from error


def check_network(name: str, *, num_classes: int, channels: int, size: int) -> nn.Module:
    """Build a network and show it two blank images, so that one that cannot take them fails before any work.

    Raises:
        RecipeError: It cannot be built, or cannot take images of this size.
    """
    with seeded(0, torch.device("cpu")), torch.no_grad():
        network = build_network(name, num_classes=num_classes, channels=channels).eval()
        try:
            logits = network(torch.zeros(2, channels, size, size))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise RecipeError(
                f"network {name!r} cannot take {channels} x {size} x {size} images ({reason}); name another architecture, "
                "or change data.size"
            ) from error
    if logits.shape != (2, num_classes):
        raise RecipeError(f"network {name!r} answers with shape {tuple(logits.shape)}, expected (2, {num_classes})")
    return network


def _from_transformers(model_type: str, num_classes: int, channels: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification

    from .teachers import _LogitsOnly

    try:
        config = AutoConfig.for_model(model_type, num_labels=num_classes, num_channels=channels)
        return _LogitsOnly(AutoModelForImageClassification.from_config(config))
    except (ValueError, KeyError) as error:
        raise RecipeError(
            f"network 'transformers:{model_type}' cannot be built: {' '.join(str(error).split())[:200]}"
        ) from error


def fit(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    schedule: Schedule = "cosine",
    ema: float = 0.0,
) -> nn.Module:
    """Train with AdamW; the state after the last step is the result, never the best on a test set.

    Args:
        network: Trained in place.
        batches: Tuples on the network's device; the first tensor is the input (B, C, H, W) in the network's own
            normalisation, the others go to `loss`.
        loss: `loss(logits, *rest)` -> scalar.
        steps: Number of batches, for the schedule.
        lr: Peak learning rate.
        weight_decay: None on one-dimensional parameters (norms and biases).
        schedule: `cosine` to zero, or `one_cycle` (warm-up, then to zero).
        ema: Decay of a moving average of the weights, which is then the result; 0 is off.

    Returns:
        The trained network in eval mode (the average, if `ema`).
    """
    network.train()
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if schedule == "one_cycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    average = copy.deepcopy(network) if ema else None
    for step, (images, *targets) in enumerate(batches):
        value = loss(network(images.contiguous(memory_format=torch.channels_last)), *targets)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        scheduler.step()
        if average is not None:
            # A short warm-up: the first steps would otherwise keep the random init in the average.
            _average_(average, network, min(ema, (1 + step) / (10 + step)))
    return (average or network).eval()


@torch.no_grad()
def _average_(average: nn.Module, network: nn.Module, decay: float) -> None:
    for ours, theirs in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if ours.is_floating_point():
            ours.lerp_(theirs, 1 - decay)
        else:
            ours.copy_(theirs)


class Top1(evaluate.Metric):
    """Share of predictions that equal their reference, in [0, 1]; `evaluate`'s accuracy, without its download."""

    def _info(self) -> evaluate.MetricInfo:
        integers = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description="Top-1 accuracy.", citation="", inputs_description="class indices", features=integers
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        hits = sum(p == r for p, r in zip(predictions, references, strict=True))
        return {"top1": hits / len(references)}


@torch.no_grad()
def score(logits: Callable[[Tensor], Tensor], split: ImageSplit, *, device: torch.device, batch_size: int = 256) -> float:
    """Top-1 in [0, 1] on a split of real images.

    Args:
        logits: Images in the reference normalisation (B, C, H, W) -> (B, K).
        split: The images.
        device: Where `logits` computes.
        batch_size: Images per call.
    """
    metric = Top1(keep_in_memory=True)
    for start in range(0, len(split), batch_size):
        rows = range(start, min(start + batch_size, len(split)))
        images = to_reference(split.images(rows).to(device))
        metric.add_batch(predictions=logits(images).argmax(1).cpu(), references=split.labels[rows.start : rows.stop])
    result = metric.compute()
    assert result is not None
    return float(result["top1"])
