"""Synthesis steps written as the published implementations compute them: the baselines of throughput.py and gpu.py.

They are literal on purpose: NCHW, eager, whole networks, statistics in two passes, and in `PrismStep` two passes of the
logit teacher. What only costs time and changes nothing is left out: unused priors, logging, and a verifier.

Legend: B images, C channels, H W pixels, G cells of a feature map.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prism_hf.images import draw_crop

BN_WEIGHT, FIRST_BN = 0.01, 10.0
LIMITS = (-2.1, 2.6)
"""Range of normalized pixels that the published step clamps to."""


def channel_statistics(x: Tensor) -> list[Tensor]:
    """Mean and variance of each channel, in two passes, the second over a permuted copy."""
    return [x.mean([0, 2, 3]), x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)]


def patch_statistics(x: Tensor, patch: int) -> list[Tensor]:
    """Mean and variance of each cell of the feature map, over batch, channels and pixels, cell by cell."""
    means, variances = [], []
    rows, columns = max(1, x.shape[2] // patch), max(1, x.shape[3] // patch)
    for row in range(rows):
        for column in range(columns):
            top, bottom = row * x.shape[2] // rows, -(-(row + 1) * x.shape[2] // rows)
            left, right = column * x.shape[3] // columns, -(-(column + 1) * x.shape[3] // columns)
            cell = x[:, :, top:bottom, left:right].contiguous()
            means.append(cell.mean())
            variances.append(cell.view(-1).var(unbiased=False))
    return [torch.stack(means), torch.stack(variances)]


@contextmanager
def hooks(model: nn.Module, kind: type[nn.Module], hook: object) -> Iterator[None]:
    """Run the block with a hook on every layer of a kind."""
    handles = [layer.register_forward_hook(hook) for layer in model.modules() if isinstance(layer, kind)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class PrismStep:
    """One step of PRISM, or of SRe2L if there is one network: view, teachers, Adam, clamp."""

    def __init__(self, models: list[nn.Module], images: Tensor, labels: Tensor) -> None:
        self.models, self.labels = models, labels
        self.pixels = images.detach().clone().contiguous().requires_grad_()
        self.adam = torch.optim.Adam([self.pixels], lr=0.05, betas=(0.5, 0.9))
        self.generator, self.step = torch.Generator().manual_seed(0), 0

    def view(self) -> Tensor:
        """A random resized crop, flip and roll of the whole batch."""
        side = self.pixels.shape[-1]
        top, left, height, width = draw_crop(1, side, (0.08, 1.0), self.generator)[0].tolist()
        flip, *roll = torch.rand(3, generator=self.generator).tolist()
        x = self.pixels[:, :, top : top + height, left : left + width]
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        x = x.flip(-1) if flip < 0.5 else x
        return torch.roll(x, [int(side // 7 * share) for share in roll], (2, 3))

    def loss(self, x: Tensor) -> Tensor:
        """Cross-entropy of the first network, plus BN alignment with every network in a pass of its own."""
        loss = F.cross_entropy(self.models[0](x), self.labels)
        for model in self.models:
            terms: list[Tensor] = []

            def hook(layer: nn.Module, inputs: tuple[Tensor, ...], _: object, terms: list[Tensor] = terms) -> None:
                mean, var = channel_statistics(inputs[0])
                terms.append(torch.norm(layer.running_var - var, 2) + torch.norm(layer.running_mean - mean, 2))

            with hooks(model, nn.BatchNorm2d, hook):
                model(x)
            loss = loss + BN_WEIGHT / len(self.models) * (FIRST_BN * terms[0] + sum(terms[1:]))
        return loss

    def __call__(self) -> None:
        """Do one step."""
        self.step += 1
        loss = self.loss(self.view())
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.pixels.data.clamp_(*LIMITS)


class GvbsmStep(PrismStep):
    """One step of G-VBSM in full: one network per step, BN and convolution statistics, moving averages, densification."""

    MOMENTUM, PATCH = 0.4, 16

    def __init__(self, models: list[nn.Module], images: Tensor, labels: Tensor, targets: list[dict[str, Tensor]]) -> None:
        super().__init__(models, images, labels)
        self.targets, self.averages = targets, [dict[str, Tensor]() for _ in models]

    def smoothed(self, averages: dict[str, Tensor], key: str, value: Tensor) -> Tensor:
        """The moving average of a statistic, with the gradient of this batch."""
        past = averages.get(key, value.detach())
        averages[key] = self.MOMENTUM * past + (1 - self.MOMENTUM) * value.detach()
        return value + (averages[key] - value.detach())

    def loss(self, x: Tensor) -> Tensor:
        """The loss with the network whose turn it is."""
        turn = (self.step - 1) % len(self.models)
        model, target, averages = self.models[turn], self.targets[turn], self.averages[turn]
        norms: list[Tensor] = []
        convolutions: list[Tensor] = []

        def match_norm(layer: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
            wanted = (layer.running_mean, layer.running_var)
            term = torch.zeros(())
            for name, value, goal in zip(("mean", "var"), channel_statistics(inputs[0]), wanted, strict=True):
                term = term + torch.norm(self.smoothed(averages, f"{name}.{len(norms)}", value) - goal, 2)
            norms.append(term * (1 if norms else FIRST_BN))

        def match_convolution(_: nn.Module, inputs: tuple[Tensor, ...], __: object) -> None:
            number, term = len(convolutions), torch.zeros(())
            values = channel_statistics(inputs[0]) + patch_statistics(inputs[0], self.PATCH)
            for name, value in zip(("channel_mean", "channel_var", "patch_mean", "patch_var"), values, strict=True):
                smooth = self.smoothed(averages, f"{name}.conv{number}", value)
                term = term + torch.norm(smooth - target[f"{number}.{name}"], 2)
            convolutions.append(term)

        with hooks(model, nn.BatchNorm2d, match_norm), hooks(model, nn.Conv2d, match_convolution):
            ce = F.cross_entropy(model(x), self.labels)
        return ce + BN_WEIGHT * (sum(norms) + sum(convolutions)) + self.densification(x)

    def densification(self, x: Tensor) -> Tensor:
        """The eigenvalues of the Gram matrix of each class, at temperature 4 and 1, compared by their KL divergence."""
        total = x.sum() * 0
        for label in self.labels.unique():
            pooled = F.adaptive_avg_pool2d(x[self.labels == label], 32).flatten(1)
            values = torch.linalg.eigvalsh(pooled @ pooled.T)
            target = (values.detach() / 4).log_softmax(0)
            total = total + F.kl_div(values.log_softmax(0), target, reduction="sum", log_target=True)
        return total
