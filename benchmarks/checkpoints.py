"""Measure the cost of a checkpoint of a large job: the seconds per write, relative to the interval between writes.

python benchmarks/checkpoints.py --output /a/folder --record benchmarks/results/checkpoints.json
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import machine
import torch

from prism_hf.recipe.plan import plan_jobs
from prism_hf.recipe.yaml_file import load_recipe
from prism_hf.runtime.checkpoint import Checkpoint, State
from prism_hf.runtime.stop import EVERY_S
from prism_hf.runtime.store import Artifact, write_json

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/imagenet/prism_ipc10.yaml"))
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    recipe = load_recipe(ROOT / args.recipe)
    job, data = plan_jobs(recipe)[0], recipe.data
    pixels = torch.randn(len(job.classes), data.channels, data.size, data.size)
    # The same tensors as in `Step.state`: the pixels and their two moments.
    state = State({key: torch.randn_like(pixels) for key in ("pixels", "adam/exp_avg", "adam/exp_avg_sq")}, {})
    checkpoint = Checkpoint(Artifact(args.output / "checkpoint.safetensors", "key"))
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        checkpoint.save(state)
        seconds.append(time.perf_counter() - started)
    write, size = statistics.median(seconds), checkpoint.file.path.stat().st_size
    checkpoint.clear()
    facts = {
        "recipe": recipe.name,
        "batch": list(pixels.shape),
        "bytes": size,
        "seconds_of_a_write": round(write, 3),
        "seconds_of_all_writes": [round(value, 3) for value in seconds],
        "pause_s": EVERY_S,
        "share_of_the_time": round(write / EVERY_S, 5),
        "command": f"python benchmarks/checkpoints.py --recipe {args.recipe.as_posix()}",
        **machine.facts(),
    }
    sys.stdout.write(f"{facts}\n")
    if args.record:
        write_json(args.record, facts)


if __name__ == "__main__":
    main()
