import copy

import pytest
import timm
import torch
from torch import nn

from prism_hf.models.folding import folded
from prism_hf.models.teacher import Teacher


def teacher_of(model, size=32):
    """Return a teacher with running statistics of random images."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, size, size))
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return Teacher("abc", model, (0.5,) * 3, (0.25,) * 3, size, 4, "abc", "none", None, "", None)


def norms(teacher):
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in teacher.model.modules())


@pytest.mark.parametrize(
    ("name", "left"),
    [("test_resnet", 0), ("test_efficientnet", 0), ("test_byobnet", 0), ("regnetx_002", 0), ("densenet121", 62)],
)
def test_folding_changes_logits_by_rounding_only(name, left):
    teacher = teacher_of(timm.create_model(name, num_classes=4))
    weights = copy.deepcopy(teacher.model.state_dict())
    ours = folded(teacher)
    assert ours is not teacher
    assert norms(ours) == left  # densenet has BN layers before convolutions, which stay
    images = torch.randn(8, 3, 32, 32)
    expected, found = teacher.logits(images), ours.logits(images)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.std())
    assert not torch.equal(found, expected)
    assert all(torch.equal(value, weights[key]) for key, value in teacher.model.state_dict().items())
    assert folded(teacher) is ours


class TwoUses(nn.Module):
    """The output of the convolution is used before and after the BN layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x)
        return self.head((x + self.norm(x)).mean((2, 3)))


class Shared(nn.Module):
    """The convolution runs twice, with different BN layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 3, 3), nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        for norm in self.norms:
            x = norm(self.conv(x))
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    """The output of the convolution is changed in place before it reaches the BN layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).relu_()).mean((2, 3)))


@pytest.mark.parametrize("network", [TwoUses, Shared, InPlace])
def test_a_network_that_cannot_be_folded_is_kept(network):
    teacher = teacher_of(network())
    assert folded(teacher) is teacher


def test_a_teacher_of_one_channel_is_folded():
    teacher = teacher_of(timm.create_model("test_resnet", num_classes=4))
    with torch.no_grad():
        gray = timm.create_model("test_resnet", num_classes=4, in_chans=1).eval()
    one = Teacher("gray", gray, (0.5,), (0.25,), 32, 4, "gray", "none", None, "", None)
    assert norms(folded(one)) == 0
    assert norms(teacher) > 0
