"""Time the README's main command before and after a change: two checkouts in turn, each run from nothing.

    python benchmarks/main_job.py --before OTHER_CHECKOUT --rounds 2 --record benchmarks/results/main_job.json

Both use the installed packages, each its own source. `--alone` adds a third variant: this checkout with one process of one
thread, to see what several processes gain.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

from prism_hf.runtime import read_json, write_json

HERE = Path(__file__).resolve().parents[1]


def run(checkout: Path, *options: str) -> dict:
    """Run the main command from nothing; return its seconds, those of each stage, and the top-1 of each row."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "accelerate.commands.launch", str(checkout / "recipes" / "prism.py"), *options]
        words += ["--output", f"{folder}/run", "--teachers", f"{folder}/teachers"]
        env = os.environ | {"PYTHONPATH": str(checkout / "src"), "TQDM_DISABLE": "1"}
        started = time.perf_counter()
        subprocess.run(words, check=True, env=env, cwd=checkout, capture_output=True)
        seconds = time.perf_counter() - started
        report = read_json(Path(folder, "run", "report.json"))
    rows = {f"{row['images']}, {row['labels']}": row["top1"] for row in report["evaluation"]["rows"]}
    return {"seconds": seconds, "stages": report["wall_time_s"], "top1": rows}


def main() -> None:
    """Run the variants in turn, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the commit to compare with")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="also one process of one thread")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    variants = {"before": (args.before.resolve(), ()), "after": (HERE, ())}
    if args.alone:
        variants["after, one process"] = (HERE, ("--processes", "1", "--threads", "1"))
    runs: dict[str, list[dict]] = {name: [] for name in variants}
    for number in range(args.rounds):
        for name, (checkout, options) in variants.items():
            runs[name].append(run(checkout, *options))
            sys.stdout.write(f"round {number}, {name}: {json.dumps(runs[name][-1])}\n")
            sys.stdout.flush()
    shares = [a["seconds"] / b["seconds"] for a, b in zip(runs["after"], runs["before"], strict=True)]
    sys.stdout.write(f"after / before: {statistics.median(shares):.2f}\n")
    if args.record:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=args.before, capture_output=True, text=True)
        command = f"python benchmarks/main_job.py --before CHECKOUT --rounds {args.rounds}{' --alone' * args.alone}"
        facts = {"command": command, **machine.facts()}
        write_json(args.record, facts | {"before": commit.stdout.strip(), "runs": runs, "share_of_time": shares})


if __name__ == "__main__":
    main()
