"""Build networks from scratch: timm architectures and transformers model types."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import RecipeError


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random state (weight init, dropout) inside the block, and restore it afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class LogitsOnly(nn.Module):
    """A transformers classifier with timm's calling convention: images (B, C, H, W) -> logits (B, K)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(pixel_values=x).logits


class SomeLogits(nn.Module):
    """A classifier that returns the logits of some of its classes: images (B, C, H, W) -> (B, number of them)."""

    chosen: Tensor

    def __init__(self, model: nn.Module, chosen: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("chosen", torch.tensor(chosen), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the chosen classes, in their order."""
        return self.model(x).index_select(1, self.chosen)


def build_network(name: str, *, num_classes: int, channels: int) -> nn.Module:
    """Build a network from scratch: a timm architecture, or `transformers:<model type>` in its default configuration.

    Raises:
        RecipeError: Unknown architecture.
    """
    try:
        if name.startswith("transformers:"):
            from transformers import AutoConfig, AutoModelForImageClassification

            model_type = name.removeprefix("transformers:")
            config = AutoConfig.for_model(model_type, num_labels=num_classes, num_channels=channels)
            return LogitsOnly(AutoModelForImageClassification.from_config(config))
        if ":" not in name and timm.is_model(name):
            return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=channels)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise RecipeError(f"network {name!r} cannot be built: {' '.join(str(error).split())[:200]}") from error
    raise RecipeError(
        f"network {name!r} cannot be built: expected a timm architecture (without a weights tag) or transformers:MODEL_TYPE"
    )


def check_network(name: str, *, num_classes: int, channels: int, size: int) -> nn.Module:
    """Build a network and run it on two blank images, so that an unsuitable network fails before any work is done.

    Raises:
        RecipeError: The network cannot be built, or cannot take images of this size.
    """
    with seeded(0, torch.device("cpu")), torch.no_grad():
        network = build_network(name, num_classes=num_classes, channels=channels).eval()
        try:
            logits = network(torch.zeros(2, channels, size, size))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise RecipeError(
                f"network {name!r} cannot take {channels} x {size} x {size} images ({' '.join(str(error).split())[:150]}); "
                "name another architecture, or change data.size"
            ) from error
    if logits.shape != (2, num_classes):
        raise RecipeError(f"network {name!r} returns logits of shape {tuple(logits.shape)}, expected (2, {num_classes})")
    return network


def operations(name: str, *, num_classes: int, channels: int, size: int) -> int:
    """Return the number of floating-point operations of a network for one image, from one pass over a blank image."""
    with seeded(0, torch.device("cpu")), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_network(name, num_classes=num_classes, channels=channels).eval()(torch.zeros(1, channels, size, size))
    return counter.get_total_flops()
