"""Plan large runs and divide them over many workers, as a run would, without computing anything.

    python benchmarks/scale.py --record benchmarks/results/scale.json

Each plan runs in a process of its own, whose peak memory is measured. The makespan is that of the busiest worker, in passes
of networks over images. Ideal is the larger of the mean over the workers and the longest job, since a job is never divided.
Hours are the passes times the time of a pass on an H200 (benchmarks/results/gpu.json).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import machine
import psutil

from prism_hf.recipe import load_recipe, plan_jobs, space_needed
from prism_hf.recipe.describe import GPU_MS, GPU_MS_MORE
from prism_hf.run.synthesize import _network_passes
from prism_hf.runtime import deal

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ("relabel.codec=float16", "relabel.stored_epochs=null", "relabel.budget=10GB")
CASES = {
    "ImageNet-1K, IPC 10": ("prism_ipc10", []),
    "ImageNet-1K, IPC 100": ("prism_ipc100", []),
    "ImageNet-21K, IPC 10": ("prism_ipc10", ["data.num_classes=21841", *BUDGET]),
}
WORKERS = (8, 64, 1024)


def plan(name: str) -> dict:
    """Plan one case, and divide it over each number of workers."""
    recipe_name, overrides = CASES[name]
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    recipe = load_recipe(ROOT / "recipes" / "imagenet" / f"{recipe_name}.yaml", overrides)
    jobs = plan_jobs(recipe)
    planned = time.perf_counter() - began
    costs = [_network_passes(job) for job in jobs]
    steps = sum(job.iterations * len(job.classes) for job in jobs)
    # The first network of a step costs GPU_MS, each other one GPU_MS_MORE.
    hours = (steps * GPU_MS + (sum(costs) - steps) * GPU_MS_MORE) / 3.6e6
    divided = {}
    for workers in WORKERS:
        began = time.perf_counter()
        hands = deal(costs, workers)
        loads = [sum(costs[job] for job in hand) for hand in hands]
        ideal = max(sum(costs) / workers, max(costs))
        divided[str(workers)] = {
            "seconds": time.perf_counter() - began,
            "makespan_over_ideal": max(loads) / ideal,
            "busy": sum(costs) / (workers * max(loads)),
            "hours": hours * max(loads) / sum(costs),
        }
    stored = recipe.stored_labels
    return {
        "jobs": len(jobs),
        "images": recipe.num_images,
        "plan_s": planned,
        "peak_mib": (psutil.Process().memory_info().rss - before) / 2**20,
        "gpu_hours": hours,
        "labels": {"codec": stored.codec, "epochs": stored.epochs},
        "disk_gb": {kind: size / 1e9 for kind, size in space_needed(recipe).items()},
        "workers": divided,
    }


def main() -> None:
    """Plan each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="plan one case and print it")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    if args.case:
        sys.stdout.write(json.dumps(plan(args.case)))
        return
    cases = {}
    for name in CASES:
        done = subprocess.run([sys.executable, __file__, "--case", name], capture_output=True, text=True, check=True)
        cases[name] = json.loads(done.stdout)
    if args.record:
        command = "python benchmarks/scale.py --record benchmarks/results/scale.json"
        text = json.dumps({"command": command, **machine.facts(), "cases": cases}, indent=2)
        args.record.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
