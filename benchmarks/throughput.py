"""Compare the speed of one synthesis step with that of the published step and with the floor, side by side in one process.

    python benchmarks/throughput.py --record benchmarks/results/throughput.json

Variants, one after the other in each round, so that a busy machine slows down all of them:

- published: the step as published code computes it; see published.py.
- ours: the step of `prism_hf.synthesize`, in float32. "ours, bf16": the same with the teachers under autocast. If asked
  for: "ours, compiled" and "ours, bf16, compiled" with --compile on, "ours, no graphs" with --compile off.
- floor (and "floor, bf16"): forward pass and input gradient of the same networks, each once, in channels_last; without
  statistics, view and optimizer.

Networks have random weights and running statistics of random images, because the time does not depend on them. Ratios are
medians over the rounds of the time of `published` divided by that of the variant, by wall time and by the CPU time of the
process. Peak memory, above that before the first step, is measured in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import machine
import psutil
import timm
import torch
import torch.nn.functional as F
from published import GvbsmStep, PrismStep
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prism_hf.method import gather_statistics, synthesize
from prism_hf.models import Teacher, frozen
from prism_hf.recipe import SynthesisJob, SynthesisRecipe, TeachersRecipe
from prism_hf.recipe.synthesis import ConvStatistics, Densification
from prism_hf.runtime import write_json

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = ("test_resnet", "test_byobnet", "test_efficientnet", "regnetx_002")
THREE = ("resnet18", "mobilenetv2_100", "efficientnet_b0")
SKIPPED, ROUNDS = 4, 5
FOREVER = 10**9
"""Iterations of the measured job: more than are ever run."""


@dataclass(frozen=True)
class Case:
    """Networks, side of the images in pixels, and batch size."""

    networks: tuple[str, ...]
    size: int
    batch: int
    method: str = "prism"


CASES = {
    "resnet18": Case(("resnet18",), 224, 16),
    "three": Case(THREE, 224, 16),
    "small20": Case(SMALL, 32, 20),
    "small100": Case(SMALL, 32, 100),
    "gvbsm": Case(THREE, 224, 16, "gvbsm"),
    "gvbsm-small": Case(SMALL, 32, 100, "gvbsm"),
}
VARIANTS = (
    "published", "ours", "ours, bf16", "ours, compiled", "ours, bf16, compiled", "ours, no graphs", "floor", "floor, bf16"
)  # fmt: skip


def network(name: str, images: torch.Tensor) -> nn.Module:
    """Return a network with random weights; its running statistics are those of random images, so no value is extreme."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(images.device)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval().requires_grad_(False)


def steps_of(case: Case, variants: tuple[str, ...], device: torch.device) -> dict[str, Callable[[], object]]:
    """Return a function for each variant that does one step."""
    torch.manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, device=device)
    labels = [number * 10 // case.batch for number in range(case.batch)]
    on_device = torch.tensor(labels, device=device)
    models = [network(name, images[:8]) for name in case.networks]
    last = [frozen(network(name, images[:8])) for name in case.networks]
    teachers = {
        name: Teacher(name, model, MEAN, STD, case.size, 10, name, "none", None, "", None)
        for name, model in zip(case.networks, last, strict=True)
    }
    gvbsm = case.method == "gvbsm"
    uint8 = torch.randint(256, images.shape, dtype=torch.uint8)
    targets = {n: gather_statistics(t, [uint8], patch=16) for n, t in teachers.items()} if gvbsm else {}
    settings = SynthesisRecipe(
        ipc=10,
        init="noise",
        batch_order="within_class",
        bn_weight=0.01,
        conv=ConvStatistics() if gvbsm else None,
        momentum=0.4 if gvbsm else 0.0,
        densification=Densification() if gvbsm else None,
    )
    drawn = {"selection": "cycle"} if gvbsm else {"extras": len(case.networks) - 1, "draw_probability": 1.0}
    rule = TeachersRecipe(logit=case.networks[0], bn_pool=case.networks[1:], **drawn)
    job = SynthesisJob(0, tuple(labels), tuple(range(case.batch)), FOREVER, 0, "slot0", rule, 0)

    def ours(**options: object) -> Callable[[], object]:
        generator = synthesize(job, settings, images, teachers, statistics=targets, **options)
        return lambda: next(generator)

    turns = cycle([[model] for model in last] if gvbsm else [last])

    def floor(half: bool = False) -> None:
        for model in next(turns):
            x = images.detach().clone(memory_format=torch.channels_last).requires_grad_()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                logits = model(x)
            F.cross_entropy(logits.float(), on_device).backward()

    if gvbsm:
        wanted = [{key: value.to(device) for key, value in targets[name].items()} for name in case.networks]
        published: Callable[[], object] = GvbsmStep(models, images, on_device, wanted)
    else:
        published = PrismStep(models, images, on_device)
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "published": lambda: published,
        "ours": ours,
        "ours, bf16": lambda: ours(precision="bf16"),
        "ours, compiled": lambda: ours(compile="on"),
        "ours, bf16, compiled": lambda: ours(compile="on", precision="bf16"),
        "ours, no graphs": lambda: ours(compile="off"),
        "floor, bf16": lambda: partial(floor, half=True),
        "floor": lambda: floor,
    }
    return {name: makers[name]() for name in variants}


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(steps: dict[str, Callable[[], object]], rounds: int, repeat: int, device: torch.device) -> dict[str, list]:
    """Return (wall, CPU) seconds of each variant in each round; a round has `repeat` steps of each."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(SKIPPED + rounds):
        for name, step in steps.items():
            wait_for(device)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeat):
                step()
            wait_for(device)
            spent = ((time.perf_counter() - wall) / repeat, (time.process_time() - cpu) / repeat)
            if number >= SKIPPED:  # the first rounds allocate memory and select kernels
                seconds[name].append(spent)
    return seconds


def flops(case: Case, device: torch.device) -> float:
    """Return the floating-point operations of the floor, for one image in one step; a G-VBSM step runs one network."""
    image, total = torch.randn(2, 3, case.size, case.size, device=device), 0
    for name in case.networks:
        x, model = image.clone().requires_grad_(), network(name, image)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        total += counter.get_total_flops()
    return total / 2 / (len(case.networks) if case.method == "gvbsm" else 1)


def peak_flops(device: torch.device) -> float:
    """Return the measured floating-point operations per second of a float32 matrix product."""
    a, best = torch.randn(2048, 2048, device=device), float("inf")
    for _ in range(8):
        wait_for(device)
        started = time.perf_counter()
        a @ a
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def peak_memory(case: Case, variant: str, device: torch.device) -> int:
    """Return the peak bytes of three steps above those before the first one. Call it in a process of its own on a CPU."""
    step = steps_of(case, (variant,), device)[variant]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(4):
            step()
        return torch.cuda.max_memory_allocated() - before
    before, status = psutil.Process().memory_info().rss, Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(3):
        step()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


def memory_of(name: str, case: Case, variant: str, args: argparse.Namespace) -> int:
    """Return `peak_memory`; on a CPU, measured in a fresh process."""
    if args.device != "cpu":
        return peak_memory(case, variant, torch.device(args.device))
    command = [sys.executable, __file__, "--cases", name, "--memory-of", variant, "--device", args.device]
    command += ["--batch", str(args.batch)] if args.batch else []
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(name: str, case: Case, variants: tuple[str, ...], threads: int, args: argparse.Namespace) -> dict[str, dict]:
    """Return the facts of each variant of a case."""
    device = torch.device(args.device)
    torch.set_num_threads(threads)
    steps = steps_of(case, variants, device)
    repeat = len(case.networks) if case.method == "gvbsm" else args.repeat  # a whole turn of the networks
    seconds = timed(steps, args.rounds, repeat, device)
    useful, facts = flops(case, device) * case.batch, {}
    peak = peak_flops(device)
    for variant, spent in seconds.items():
        walls, cpus = zip(*spent, strict=True)
        base = seconds["published"]
        facts[variant] = {
            "wall_s": statistics.median(walls),
            "cpu_s": statistics.median(cpus),
            "ratio_wall": statistics.median(b[0] / s[0] for b, s in zip(base, spent, strict=True)),
            "ratio_cpu": statistics.median(b[1] / s[1] for b, s in zip(base, spent, strict=True)),
            "image_iterations_per_s": case.batch / statistics.median(walls),
            "gflop_per_s": useful / statistics.median(walls) / 1e9,
            "share_of_peak": useful / statistics.median(walls) / peak,
        }
        if args.memory and threads == args.threads[0]:
            facts[variant]["peak_bytes"] = memory_of(name, case, variant, args)
    return facts


def plot(cases: dict[str, dict], path: Path) -> None:
    """Draw the ratios to `published` of all cases as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = [name for name in VARIANTS if all(name in case["variants"] for case in cases.values())]
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        places = [place + (number - (len(variants) - 1) / 2) * width for place in range(len(cases))]
        axes.bar(places, [case["variants"][variant]["ratio_cpu"] for case in cases.values()], width, label=variant)
    axes.set_xticks(range(len(cases)), [name.replace(", ", "\n") for name in cases], fontsize=8)
    axes.set_ylabel("speed / published step")
    axes.axhline(1, color="black", linewidth=0.6)
    axes.legend(ncols=len(variants), fontsize=8, frameon=False, loc="upper right")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--variants", nargs="+", default=["published", "ours", "ours, bf16", "floor"], choices=VARIANTS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--repeat", type=int, default=1, help="steps of each variant in a round")
    parser.add_argument("--batch", type=int, help="another batch size for all cases")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    cases = {name: CASES[name] for name in args.cases}
    if args.batch:
        cases = {k: Case(c.networks, c.size, args.batch, c.method) for k, c in cases.items()}
    if args.memory_of:
        sys.stdout.write(f"{peak_memory(cases[args.cases[0]], args.memory_of, torch.device(args.device))}\n")
        return
    measured: dict[str, dict] = {}
    for name, case in cases.items():
        for threads in args.threads:
            facts = measure(name, case, tuple(args.variants), threads, args)
            measured[f"{name}, {threads} thread{'s' if threads > 1 else ''}"] = {"case": case.__dict__, "variants": facts}
            for variant, row in facts.items():
                memory = f", {row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else ""
                ratios = f"ratio wall {row['ratio_wall']:.2f}, cpu {row['ratio_cpu']:.2f}"
                speed = f"{1000 * row['wall_s']:.0f} ms, {100 * row['share_of_peak']:.0f} % of peak"
                sys.stdout.write(f"{name}, {threads} threads, {variant}: {ratios}, {speed}{memory}\n")
            sys.stdout.flush()
        if args.record:  # after each case: a later one may not end
            command = f"python benchmarks/throughput.py {' '.join(sys.argv[1:])}"
            write_json(args.record, {"command": command, **machine.facts(), "cases": json.loads(json.dumps(measured))})
    if args.plot:
        plot(measured, args.plot)


if __name__ == "__main__":
    main()
