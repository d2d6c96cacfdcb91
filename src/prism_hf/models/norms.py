"""Layers of a frozen network in another form: BN layers with another computation, convolutions with bf16 weights."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of 1d, 2d, 3d and synchronized BN
from torch.overrides import TorchFunctionMode

Forward = Callable[[Tensor], Tensor]
Normalize = Callable[[_BatchNorm, Tensor], Tensor]
"""A layer and its input -> its output."""


_KEEP_INPUT = (nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish)
"""Activations whose gradient needs their input: in place, they copy it first, which saves nothing."""


def frozen(model: nn.Module) -> nn.Module:
    """Make a network a teacher, in place: eval mode, channels_last, no gradients of parameters, no needless copies."""
    for layer in model.modules():
        if isinstance(layer, _KEEP_INPUT):
            layer.inplace = False
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Let layers run these functions instead of their own `forward` within the block."""
    before = {layer: layer.__dict__.get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layer.__dict__["forward"] = forward
        yield
    finally:
        for layer, earlier in before.items():
            if earlier is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = earlier


def normalized_by(layer: _BatchNorm, normalize: Normalize) -> Forward:
    """Return a `forward` for a BN layer in eval mode, with running statistics, that computes its output by `normalize`.

    The two common classes are written out, because interception takes time.
    """
    normalized = partial(normalize, layer)

    def with_activation(x: Tensor) -> Tensor:
        assert isinstance(layer, BatchNormAct2d)
        activated: Tensor = layer.act(layer.drop(normalized(x)))
        return activated

    def intercepted(x: Tensor) -> Tensor:
        with _Intercepted(normalized):
            return type(layer).forward(layer, x)

    if type(layer).forward is _BatchNorm.forward:
        return normalized
    return with_activation if type(layer).forward is BatchNormAct2d.forward else intercepted


class _Intercepted(TorchFunctionMode):
    """Replaces `torch.nn.functional.batch_norm` in the block by a function of its input."""

    def __init__(self, normalized: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._normalized = normalized

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm:
            return self._normalized(args[0] if args else kwargs["input"])
        return function(*args, **(kwargs or {}))


@lru_cache(maxsize=32)
def with_bf16_weights(model: nn.Module) -> nn.Module:
    """Return a copy for autocast, with the same results: autocast would round frozen weights again at every pass."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if type(layer) in (nn.Conv2d, Conv2dSame, nn.Linear):
            layer.to(torch.bfloat16)
    return model
