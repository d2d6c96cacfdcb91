"""Benchmark of one synthesis step on a GPU against a plain implementation: speed, memory, precision.

    python benchmarks/gpu.py --record benchmarks/results/gpu_step.json

The cases match ImageNet-1K: 224 pixels, batches of 100 images, one teacher (SRe2L) or three (PRISM). The networks have
random weights, because the time does not depend on them. Each round runs every variant once; results are medians over the
rounds. `plain` does what published implementations do; see step_time.py.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import machine
import torch
from step_time import NORM, network, plain_step

from prism_hf.method.objective import Objective
from prism_hf.models.teacher import Teacher
from prism_hf.recipe import SynthesisRecipe, TeachersRecipe
from prism_hf.runtime import write_json

CASES = {
    "SRe2L: resnet18": ("resnet18",),
    "PRISM: resnet18 + mobilenetv2_100 + efficientnet_b0": ("resnet18", "mobilenetv2_100", "efficientnet_b0"),
}


@contextmanager
def variants(
    names: tuple[str, ...], batch: int, size: int, device: torch.device
) -> Iterator[dict[str, Callable[[], None]]]:
    """Yield the steps to time: plain and ours in float32, and ours in bf16."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(10, (batch,), device=device)
    plain = [network(name, torch.contiguous_format).to(device) for name in names]
    ours = {
        name: Teacher(name, network(name, torch.channels_last).to(device), *NORM, size, 10, name, "none", None, "", None)
        for name in names
    }
    rule, settings = TeachersRecipe(logit=names[0], bn_pool=names[1:]), SynthesisRecipe(ipc=1, bn_weight=0.01)
    with Objective(rule, settings, ours) as full, Objective(rule, settings, ours, precision="bf16") as half:

        def step(objective: Objective) -> None:
            leaf = images.detach().clone().contiguous(memory_format=torch.channels_last).requires_grad_()
            objective.backward(leaf, labels, names)

        yield {
            "plain, float32": lambda: plain_step(plain, images, labels),
            "ours, float32": lambda: step(full),
            "ours, bf16": lambda: step(half),
        }


def measure(
    names: tuple[str, ...], batch: int, size: int, rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return the median seconds, image-iterations per second, speedup over plain, and peak bytes of each variant."""
    seconds: dict[str, list[float]] = {}
    peak: dict[str, int] = {}
    with variants(names, batch, size, device) as steps:
        for number in range(rounds + 3):
            for label, step in steps.items():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held, began = torch.cuda.memory_allocated(), time.perf_counter()
                step()
                torch.cuda.synchronize()
                if number >= 3:  # the first rounds include kernel selection
                    seconds.setdefault(label, []).append(time.perf_counter() - began)
                peak[label] = torch.cuda.max_memory_allocated() - held
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    return {
        label: {
            "seconds_per_step": median,
            "image_iterations_per_second": batch / median,
            "times_plain": medians["plain, float32"] / median,
            "peak_bytes": peak[label],
        }
        for label, median in medians.items()
    }


def main() -> None:
    """Measure and print all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, found none; use step_time.py to measure on the CPU")
    device = torch.device("cuda")
    cases = {label: measure(names, args.batch, args.size, args.rounds, device) for label, names in CASES.items()}
    for label, case in cases.items():
        for variant, facts in case.items():
            rate, ratio = facts["image_iterations_per_second"], facts["times_plain"]
            sys.stdout.write(f"{label}; {variant}: {rate:.0f} image-iterations/s, {ratio:.2f} x plain, ")
            sys.stdout.write(f"{facts['peak_bytes'] / 1e9:.2f} GB\n")
    if args.record:
        command = f"python benchmarks/gpu.py --batch {args.batch} --size {args.size} --rounds {args.rounds}"
        facts = {"command": command, "device": torch.cuda.get_device_name(), **machine.facts(), "cases": cases}
        write_json(args.record, facts)


if __name__ == "__main__":
    main()
