"""A teacher: a frozen image classifier with its own normalization, input size and license."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TeacherError
from ..images import find_classes, plain_name, reference_mean_std, to_reference
from .build import SomeLogits
from .norms import frozen


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen classifier and what it expects of its input.

    Attributes:
        model: (B, 3 or 1, H, W) in its own normalization -> logits (B, K); eval mode, no parameter gradients.
        mean, std: Per channel of the input, in [0, 1] pixel units.
        order: Channel of the image that each channel of the input is, such as (2, 1, 0) for BGR; `None` for all in order.
        size: Side length of its input in pixels.
        license: License of the weights, or "unknown".
        revision: Hub commit of the weights, or `None` for local ones.
        weights_sha256: SHA-256 of all parameters and buffers, from `digest_of_tensors`.
        label_names: The teacher's own class names, if known.
    """

    name: str
    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    num_classes: int
    architecture: str
    license: str
    revision: str | None
    weights_sha256: str
    label_names: tuple[str, ...] | None
    order: tuple[int, ...] | None = None

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.model.parameters()).device

    def prepare(self, images: Tensor) -> Tensor:
        """Convert (B, C, H, W) images from the reference normalization to this teacher's normalization, channels and size.

        Gray images are copied to all channels of the teacher; the gradients of the copies add up.
        """
        order = None if self.order is None or images.shape[1] == 1 else self.order
        x = images if order is None else images[:, order]
        shift, scale = _from_reference(self.mean, self.std, order, images.shape[1], images.device, images.dtype)
        x = torch.addcmul(shift, x, scale)
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        return x.contiguous(memory_format=torch.channels_last)

    def logits(self, images: Tensor) -> Tensor:
        """Return raw logits, (B, K), of images in the reference normalization, (B, C, H, W)."""
        return self.model(self.prepare(images))


@lru_cache(maxsize=256)
def _from_reference(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    order: tuple[int, ...] | None,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return shift and scale, (1, C, 1, 1) on the device, from the reference normalization to another one. Made once."""
    like = torch.empty(0, device=device, dtype=dtype)
    reference_mean, reference_std = (
        part if order is None else part[:, order] for part in reference_mean_std(channels, like=like)
    )
    own_mean, own_std = (torch.tensor(values).to(like).view(1, -1, 1, 1) for values in (mean, std))
    return (reference_mean - own_mean) / own_std, reference_std / own_std


def fit_teacher(teacher: Teacher, *, class_names: Sequence[str], channels: int) -> Teacher:
    """Return a teacher with the logits of these classes, in this order. It is the same one if it has them already.

    Classes are matched by WordNet id or name. A teacher without class names must have as many classes as the data.

    Raises:
        TeacherError: A class that the teacher does not know, too few classes, or too few input channels.
    """
    if len(teacher.mean) < channels:
        raise TeacherError(
            f"teacher {teacher.name!r} takes images of 1 channel, but the data has {channels}; set data.channels"
        )
    own, where = teacher.label_names, f"teacher {teacher.name!r}"
    if own is None or (len(own) == len(class_names) and _agree(own, class_names)):
        if teacher.num_classes != len(class_names):
            raise TeacherError(
                f"{where} has {teacher.num_classes} classes without names, but the data has {len(class_names)}; use a "
                "teacher of this dataset, squeeze one, or one whose config names its classes"
            )
        return teacher
    chosen = find_classes(class_names, own, where, TeacherError)
    if len(set(chosen)) < len(chosen):
        twice = next(number for place, number in enumerate(chosen) if number in chosen[:place])
        names = " and ".join(repr(class_names[place]) for place, number in enumerate(chosen) if number == twice)
        raise TeacherError(f"{where} has one class {own[twice]!r} for {names} of the data; use another teacher")
    model = frozen(SomeLogits(teacher.model, chosen).to(teacher.device))
    names_of = tuple(own[number] for number in chosen)
    return replace(teacher, model=model, num_classes=len(chosen), label_names=names_of)


def _agree(own: Sequence[str], data: Sequence[str]) -> bool:
    """Return whether no class of one list has another number in the other, whatever its case and the signs in it."""
    plain, others = list(map(plain_name, own)), list(map(plain_name, data))
    if len(set(plain)) < len(plain) or len(set(others)) < len(others):  # some differ only in case or signs, such as A and a
        plain, others = list(own), list(data)
    repeated = {label for names in (plain, others) for label, count in Counter(names).items() if count > 1}
    numbers = {label: number for number, label in enumerate(plain) if label not in repeated}
    return all(numbers.get(label, number) == number for number, label in enumerate(others))


@torch.no_grad()
def penultimate_features(
    teacher: Teacher, images: Callable[[range], Tensor], count: int, *, batch_size: int = 256
) -> Iterator[tuple[range, Tensor]]:
    """Yield the inputs of the classifier layer batch by batch: row numbers and features, (B, D) float32 on the CPU.

    `images` maps row numbers below `count` to images, (B, C, H, W) uint8.

    Raises:
        TeacherError: The network does not end in a linear layer.
    """
    classifier = classifier_of(teacher.model)
    if classifier is None:
        raise TeacherError(f"network {teacher.name!r} has no linear layer and thus no penultimate features; use another")
    features: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(1).float().cpu()))
    try:
        for start in range(0, count, batch_size):
            rows = range(start, min(start + batch_size, count))
            teacher.logits(to_reference(images(rows).to(teacher.device)))
            yield rows, torch.cat(features)
            features.clear()
    finally:
        handle.remove()


def classifier_of(model: nn.Module) -> nn.Linear | None:
    """Return the linear layer that computes the logits: the one that timm names, else the last one, else `None`."""
    named = getattr(model, "get_classifier", None)
    if callable(named):
        layer = named()
        return layer if isinstance(layer, nn.Linear) else None
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return linear[-1] if linear else None


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the names, shapes, dtypes and bytes of tensors, such as the state dict of a network."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
