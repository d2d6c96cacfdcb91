"""Teachers for inference: each BN layer is folded into the convolution before it, which saves a pass over its input."""

import copy
import logging
from dataclasses import replace
from functools import lru_cache

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .teacher import Teacher

log = logging.getLogger(__name__)
_TOLERANCE = 1e-4
"""Largest difference of logits that folding may make, as a share of their spread. Rounding makes about 1e-6."""


@lru_cache(maxsize=32)
@torch.no_grad()
def folded(teacher: Teacher) -> Teacher:
    """Return a copy of a teacher whose BN layers are folded into convolutions; its logits differ by rounding only.

    Which convolution feeds a BN layer is seen in one pass over random images. The copy must have the logits of the original
    on them; otherwise, as when the output of a convolution is used elsewhere too, the teacher itself is returned.
    """
    generator, size = torch.Generator().manual_seed(0), teacher.size
    images = torch.randn(4, len(teacher.mean), size, size, generator=generator).to(teacher.device)
    model = copy.deepcopy(teacher.model)
    candidate = replace(teacher, model=model)
    pairs = _pairs(candidate, images)
    if not pairs:
        return teacher
    for convolution, norm in pairs.items():
        before, layer = model.get_submodule(convolution), model.get_submodule(norm)
        assert isinstance(before, nn.Conv2d)
        assert isinstance(layer, nn.BatchNorm2d)
        rest = nn.Sequential(layer.drop, layer.act) if isinstance(layer, BatchNormAct2d) else nn.Identity()
        model.set_submodule(convolution, fuse_conv_bn_eval(before, layer))
        model.set_submodule(norm, rest.eval())
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # TF32 would round more than the tolerance.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        expected, found = teacher.logits(images), candidate.logits(images)
    if not float((found - expected).abs().max()) <= _TOLERANCE * float(expected.std()):  # or not a number
        log.info("teacher %s: BN layers are not folded, because that changed its logits", teacher.name)
        return teacher
    return candidate


def _pairs(teacher: Teacher, images: Tensor) -> dict[str, str]:
    """Return the names of convolutions and BN layers whose input is, as an object, the output of the convolution."""
    names = {module: name for name, module in teacher.model.named_modules()}
    outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # holds the tensors, so that no number is used twice
    pairs: dict[str, str] = {}
    runs: dict[nn.Module, int] = {}

    def after_convolution(layer: nn.Module, _: object, output: Tensor) -> None:
        outputs[id(output)] = (output, layer)
        runs[layer] = runs.get(layer, 0) + 1

    def before_norm(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        runs[layer] = runs.get(layer, 0) + 1
        if id(inputs[0]) in outputs:
            pairs[names[outputs[id(inputs[0])][1]]] = names[layer]

    handles = []
    for module in names:
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        teacher.logits(images)
    finally:
        for handle in handles:
            handle.remove()
    once = {names[layer] for layer, count in runs.items() if count == 1}
    return {a: b for a, b in pairs.items() if {a, b} <= once}
