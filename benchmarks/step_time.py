"""Measure the speedup of one synthesis step over a plain implementation, side by side in one process.

`python benchmarks/step_time.py` writes benchmarks/results/step_time.json. The plain step does what published code does: it
runs the logit teacher twice (once for its logits, once as a BN teacher), computes statistics in two passes over a permuted
copy, and runs complete networks in NCHW. The networks have random weights, because the time does not depend on them. Both
steps alternate; the result is the median of the ratios.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prism_hf.dataset.provenance import versions
from prism_hf.method.objective import Objective
from prism_hf.models.teacher import Teacher
from prism_hf.recipe.schema import TeachersRecipe
from prism_hf.recipe.synthesis import SynthesisRecipe
from prism_hf.runtime.store import write_json

RESULT = Path(__file__).resolve().parent / "results" / "step_time.json"
CASES = {
    "32 px, batch 20, test_resnet + test_byobnet + test_efficientnet": (
        ("test_resnet", "test_byobnet", "test_efficientnet"),
        32,
        20,
    ),
    "224 px, batch 16, resnet18 + mobilenetv2_100": (("resnet18", "mobilenetv2_100"), 224, 16),
}
ROUNDS = 9
NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that the networks expect."""


def network(name: str, memory_format: torch.memory_format) -> nn.Module:
    """Create a frozen network with random weights."""
    model = timm.create_model(name, num_classes=10).eval().requires_grad_(False)
    return model.to(memory_format=memory_format)


def plain_step(models: list[nn.Module], images: Tensor, labels: Tensor) -> None:
    """Run a step on the CE of the first network plus the R_bn of all networks, as published code computes them."""
    x = images.detach().clone().requires_grad_()
    loss = F.cross_entropy(models[0](x), labels)
    for model in models:
        terms: list[Tensor] = []

        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], _output: object, terms: list[Tensor] = terms) -> None:
            value = inputs[0]
            mean = value.mean([0, 2, 3])
            var = value.permute(1, 0, 2, 3).contiguous().view(value.shape[1], -1).var(1, unbiased=False)
            terms.append(torch.norm(layer.running_var - var, 2) + torch.norm(layer.running_mean - mean, 2))

        handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        model(x)
        for handle in handles:
            handle.remove()
        loss = loss + 0.01 / len(models) * sum(terms)
    loss.backward()


def measure(names: tuple[str, ...], size: int, batch: int) -> dict[str, object]:
    """Return the seconds of both steps in each round, and the median of their ratios."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    plain = [network(name, torch.contiguous_format) for name in names]
    ours = {}
    for name in names:
        model = network(name, torch.channels_last)
        ours[name] = Teacher(name, model, *NORM, size, 10, name, "none", None, "", None)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    rule, settings = TeachersRecipe(logit=names[0], bn_pool=names[1:]), SynthesisRecipe(ipc=1, bn_weight=0.01)
    with Objective(rule, settings, ours) as objective:

        def step() -> None:
            leaf = images.detach().clone().contiguous(memory_format=torch.channels_last).requires_grad_()
            objective.backward(leaf, labels, names, logit=names[0])

        for number in range(ROUNDS + 2):
            for label, run in (("plain", lambda: plain_step(plain, images, labels)), ("ours", step)):
                started = time.perf_counter()
                run()
                if number >= 2:  # the first rounds allocate memory
                    seconds[label].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    return {"seconds": seconds, "median_ratio": statistics.median(ratios), "ratios": ratios}


def main() -> None:
    """Measure all cases and write the JSON."""
    cases = {label: measure(*case) for label, case in CASES.items()}
    hardware = {"device": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    write_json(
        RESULT,
        {"command": "python benchmarks/step_time.py", "hardware": hardware, "versions": versions(), "cases": cases},
    )
    sys.stdout.write(json.dumps({label: round(case["median_ratio"], 2) for label, case in cases.items()}) + "\n")


if __name__ == "__main__":
    main()
