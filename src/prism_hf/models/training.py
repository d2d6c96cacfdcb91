"""Train and score a network: one loop for squeezed teachers, students and the full-data ceiling.

Legend: B images, C channels, H W pixels, K classes.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import datasets
import evaluate
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import NotFiniteError, RecipeError
from ..images import ImageSplit, to_reference
from ..recipe import batch_ranges
from ..runtime import Checkpoint, State, raise_if_stopped, told_in_one_line

CHECK_EVERY = 20
"""Steps between checks of the losses; each check waits for the device."""
FUSED = ("cpu", "cuda")
"""Devices with a kernel that updates all parameters at once."""
TORCH = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
"""Optimizers with such a kernel; all others come from timm."""
UNSUITED = ("adahessian", "bnb", "fused", "adafactorbv", "cadafactorbv", "kron")
"""Names, or their beginnings, of timm's optimizers that need a Hessian or other packages, or cannot be resumed."""
Schedule = Literal["cosine", "one_cycle"]
AtStep = Callable[[int], None]
"""Told how many steps of a training are done."""


class Batches:
    """Tuples of tensors to train on, resumable after any batch: `draw(done)` yields the batches after the first `done`."""

    def __init__(self, draw: Callable[[int], Iterator[tuple[Tensor, ...]]]) -> None:
        self._draw, self._done = draw, 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._draw(self._done):
            self._done += 1
            yield batch

    def state(self) -> dict[str, Tensor]:
        """Return the state that the next batch depends on."""
        return {"done": torch.tensor(self._done)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from `state`."""
        self._done = int(state["done"])


class ShuffledBatches(Batches):
    """Batches of a table of `count` rows, in a new order each epoch.

    `parts` are the positions of each batch in the order of an epoch. `make` turns row numbers, (B,) int64, and `generator`
    into a batch. `generator` draws the orders and all random numbers that `make` needs.
    """

    def __init__(
        self,
        parts: Sequence[range],
        epochs: int,
        generator: torch.Generator,
        make: Callable[[Tensor, torch.Generator], tuple[Tensor, ...]],
        *,
        count: int,
    ) -> None:
        super().__init__(self._shuffled)
        self._parts, self._epochs, self._generator, self._make, self._count = parts, epochs, generator, make, count
        self._order = torch.empty(0, dtype=torch.int64)

    def _shuffled(self, done: int) -> Iterator[tuple[Tensor, ...]]:
        for number in range(done, self._epochs * len(self._parts)):
            part = self._parts[number % len(self._parts)]
            if part is self._parts[0]:
                self._order = torch.randperm(self._count, generator=self._generator)
            yield self._make(self._order[part.start : part.stop], self._generator)

    def state(self) -> dict[str, Tensor]:
        """Return the state, including the order of the current epoch and the generator."""
        return super().state() | {"order": self._order, "generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from `state`."""
        super().restore(state)
        self._order = state["order"]
        self._generator.set_state(state["generator"])


class _Training:
    """The state of a training run between two steps; see `fit` for the arguments."""

    def __init__(
        self,
        network: nn.Module,
        what: str,
        *,
        steps: int,
        lr: float,
        weight_decay: float,
        schedule: Schedule,
        ema: float,
        optimizer: str = "adamw",
        stretch: float = 1.0,
        micro_batch: int | None = None,
    ) -> None:
        matrices = [p for p in network.parameters() if p.ndim > 1]
        vectors = [p for p in network.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.network, self.what, self.ema, self.micro_batch = network, what, ema, micro_batch
        self.step, self.steps = 0, steps
        self.device = next(network.parameters()).device
        self.optimizer: torch.optim.Optimizer
        if kind := TORCH.get(optimizer):
            self.optimizer = kind(groups, lr=lr, fused=self.device.type in FUSED)
        else:
            self.optimizer = create_optimizer_v2(groups, opt=optimizer, lr=lr, weight_decay=weight_decay)
        self.scheduler: torch.optim.lr_scheduler.LRScheduler
        if schedule == "one_cycle":
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=lr, total_steps=steps)
        else:
            self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=round(stretch * steps))
        self.average = ModelEmaV3(network) if ema else None
        self.losses: list[Tensor] = []

    def run(
        self, batches: Batches, loss: Callable[..., Tensor], checkpoint: Checkpoint | None, at_step: AtStep
    ) -> nn.Module:
        """Train to the end, from the checkpoint if there is one; see `fit`."""
        self.network.train()
        if checkpoint is not None and (saved := checkpoint.load()) is not None:
            self.restore(saved, batches)
        at_step(self.step)
        for images, *targets in batches:
            self.advance(loss, images, targets)
            if self.step % CHECK_EVERY == 0 or self.step == self.steps:
                self.check()
                at_step(self.step)
            if checkpoint is not None:
                checkpoint.tick(lambda: self.state(batches))
            else:
                raise_if_stopped()
        return (self.network if self.average is None else self.average.module).eval()

    def advance(self, loss: Callable[..., Tensor], images: Tensor, targets: Sequence[Tensor]) -> None:
        with told_in_one_line(
            f"{self.what}: a batch of {len(images)} images",
            "Lower its batch_size in the recipe, or use a device with more memory",
        ):
            self.optimizer.zero_grad(set_to_none=True)
            value = self._backward(loss, images, targets)
            self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            # Warm up the decay; otherwise the random initial weights would stay in the average.
            self.average.decay = min(self.ema, (1 + self.step) / (10 + self.step))
            self.average.update(self.network)
        self.losses.append(value)
        self.step += 1

    def _backward(self, loss: Callable[..., Tensor], images: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Compute the gradient of a batch, as the weighted sum of those of its micro-batches; return the loss."""
        count = len(images)
        parts = batch_ranges(count, self.micro_batch or count)
        total = torch.zeros((), device=self.device)
        for part in parts:
            rows = slice(part.start, part.stop)
            view = images[rows].contiguous(memory_format=torch.channels_last)
            value = loss(self.network(view), *(target[rows] for target in targets))
            if len(parts) > 1:
                value = value * (len(part) / count)
            value.backward()
            total += value.detach()
        return total

    def check(self) -> None:
        """Raise an error if a loss is not finite; reading the losses waits for the device."""
        values = torch.stack(self.losses).tolist() if self.losses else []
        for step, value in enumerate(values, self.step - len(values) + 1):
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"{self.what}, step {step}: the loss is {value:g}; lower the learning rate of the recipe"
                )
        self.losses = []

    def state(self, batches: Batches) -> State:
        self.check()
        optimizer = optimizer_state(self.optimizer)
        tensors = prefixed("network", self.network.state_dict()) | prefixed("optimizer", optimizer.tensors)
        tensors |= prefixed("random", random_state(self.device)) | prefixed("batches", batches.state())
        tensors |= prefixed("average", self.average.state_dict() if self.average is not None else {})
        notes = {"step": self.step, "optimizer": optimizer.notes, "scheduler": self.scheduler.state_dict()}
        return State(tensors, notes)

    def restore(self, state: State, batches: Batches) -> None:
        tensors = state.tensors
        self.network.load_state_dict(part("network", tensors))
        if self.average is not None:
            self.average.load_state_dict(part("average", tensors))
        restore_optimizer(self.optimizer, State(part("optimizer", tensors), state.notes["optimizer"]))
        self.scheduler.load_state_dict(state.notes["scheduler"])
        restore_random_state(part("random", tensors), self.device)
        batches.restore(part("batches", tensors))
        self.step = state.notes["step"]


def fit(
    network: nn.Module,
    batches: Batches,
    loss: Callable[..., Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    schedule: Schedule = "cosine",
    ema: float = 0.0,
    optimizer: str = "adamw",
    stretch: float = 1.0,
    micro_batch: int | None = None,
    what: str = "training",
    checkpoint: Checkpoint | None = None,
    at_step: AtStep = lambda _: None,
) -> nn.Module:
    """Train and return the network after the last step, never the one that scores best on a test set.

    Batches are on the network's device: the input, (B, C, H, W) in the network's own normalization, and the other
    arguments of `loss(logits, *rest)`, a scalar. `lr` is the peak of a schedule over `steps` batches: `cosine` (decay
    to zero) or `one_cycle` (warm-up, then decay to zero). A cosine of `stretch` times the steps does not decay to zero.
    The gradient of a batch is computed in micro-batches of `micro_batch` images, on each of which the network's batch
    norms compute. One-dimensional parameters (norms and biases) have no weight decay. `ema` is the decay of an
    exponential moving average of the weights; 0 disables it. `optimizer` is a name that `check_optimizer` accepts. `what`
    names the network in error messages. `at_step` is called with the number of finished steps: at the start (above 0 after
    a resume), then every few steps.

    Returns:
        The network, or its moving average if `ema` is set, in eval mode.

    Raises:
        NotFiniteError: The loss is NaN or infinite.
    """
    training = _Training(
        network,
        what,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        schedule=schedule,
        ema=ema,
        optimizer=optimizer,
        stretch=stretch,
        micro_batch=micro_batch,
    )
    return training.run(batches, loss, checkpoint, at_step)


def known_optimizers() -> list[str]:
    """Return the names of timm's optimizers that students can use."""
    return sorted({*TORCH, *(name for name in list_optimizers() if not name.startswith(UNSUITED))})


def check_optimizer(name: str) -> None:
    """Raise a `RecipeError` if timm has no optimizer of this name, or none that works with a learning rate alone."""
    if name not in (known := known_optimizers()):
        close = difflib.get_close_matches(name, known) or ["adamw", "muon", "lion"]
        raise RecipeError(f"evaluation.optimizer is {name!r}; use one that timm has, such as {', '.join(close)}")


class Top1(evaluate.Metric):
    """Top-1 accuracy in [0, 1]: the accuracy of `evaluate`, but without its download."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("int64")))
        return evaluate.MetricInfo(description="Top-1 accuracy.", citation="", features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        hits = sum(p == r for p, r in zip(predictions, references, strict=True))
        return {"top1": hits / len(references)}


@torch.no_grad()
def score(logits: Callable[[Tensor], Tensor], split: ImageSplit, *, device: torch.device, batch_size: int = 256) -> float:
    """Return the top-1 accuracy in [0, 1] on a split of real images.

    `logits` takes images in the reference normalization, (B, C, H, W) on `device`, and returns (B, K).
    """
    metric = Top1(keep_in_memory=True)
    for rows in torch.arange(len(split)).split(batch_size):
        images = to_reference(split.images(rows).to(device))
        metric.add_batch(predictions=logits(images).argmax(1).cpu(), references=split.labels[rows.numpy()])
    return float(metric.compute()["top1"])


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """Return the state of an optimizer: tensors as `INDEX.KEY`, parameter groups in the notes."""
    plain = optimizer.state_dict()
    values = {f"{index}.{key}": value for index, entry in plain["state"].items() for key, value in entry.items()}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in values.items() if name not in tensors}  # some optimizers count steps so
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in plain["param_groups"]
    ]
    return State(tensors, {"groups": groups} | ({"numbers": numbers} if numbers else {}))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Restore the state that `optimizer_state` returned."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, object]] = {}
    for name, value in state.tensors.items():
        index, _, key = name.partition(".")
        like = parameters[int(index)]
        # Keep the memory layout of the parameter: another layout may round differently in the last bit.
        tensor = torch.empty_like(like, dtype=value.dtype).copy_(value) if value.shape == like.shape else value
        entries.setdefault(int(index), {})[key] = tensor
    for name, value in state.notes.get("numbers", {}).items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": state.notes["groups"]})


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a prefix on each name, so that one file can contain several states."""
    return {f"{prefix}/{key}": value for key, value in tensors.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, without the prefix."""
    return {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the global random state of the CPU and of `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the state that `random_state` returned; the state of another type of device is ignored."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
