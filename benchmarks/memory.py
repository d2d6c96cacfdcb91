"""Measure the peak memory of every stage at two scales: 1x, and 10x the images, jobs and epochs of views.

    python benchmarks/memory.py --output /a/folder --record benchmarks/results/memory.json

The measure is anonymous memory (RssAnon on Linux), which the kernel cannot drop; mapped files do not count. With `--plain`,
the allocators return freed memory to the system. By default they keep some of it, and more of it after more allocations.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PLAIN = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
"""Environment variables that make glibc and Arrow return freed memory to the system."""
STAGES = ("synthesize", "relabel", "package", "evaluate")
RECIPE = (
    "data.channels=3", "synthesis.iterations=2", "synthesis.slots_per_batch=1", "synthesis.batch_size=10",
    "synthesis.init=noise", "relabel.batch_size=10", "squeeze.epochs=1", "squeeze.batch_size=64",
    "teachers.logit=squeeze:test_byobnet", "teachers.bn_pool=[squeeze:test_efficientnet]", "teachers.verifier=null",
    "relabel.teachers=[squeeze:test_byobnet]", "evaluation.student=test_byobnet", "evaluation.full_data_epochs=0",
    "evaluation.batch_size=10", "evaluation.seeds=[0]", "evaluation.epochs=2",
)  # fmt: skip


def anonymous_bytes(pid: int) -> int:
    """Return RssAnon of a process in bytes, or 0 if it has exited."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def peak_of(arguments: list[str], env: dict[str, str]) -> int:
    """Run a command and return its peak RssAnon in bytes, sampled every 5 ms."""
    process = subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, error = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {error[-1500:]}")
    return peak


def command(folder: Path, stage: str, *, size: int, ipc: int, epochs: int) -> list[str]:
    """Return the command of one stage of the run."""
    scale = (f"data.size={size}", f"synthesis.ipc={ipc}", f"relabel.epochs={epochs}")
    options = ("--output", str(folder), "--teachers", str(folder.parent / "teachers"), "--stage", stage)
    recipe = str(ROOT / "recipes" / "digits" / "prism_ipc10.yaml")
    return [sys.executable, str(ROOT / "recipes" / "prism.py"), recipe, *RECIPE, *scale, *options]


def measure(output: Path, *, size: int, ipc: int, epochs: int, env: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return each stage's peak bytes: `ipc` with a tenth of `epochs` (at least 2), and ten times `ipc` with `epochs`."""
    runs = {"1x": (ipc, max(2, epochs // 10)), "10x": (10 * ipc, epochs)}
    peaks: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for name, (count, views) in runs.items():
        folder = output / name
        peak_of(command(folder, "squeeze", size=size, ipc=count, epochs=views), env)
        for stage in STAGES:
            peaks[stage][name] = peak_of(command(folder, stage, size=size, ipc=count, epochs=views), env)
    for stage, peak in peaks.items():
        peak["ratio"] = round(peak["10x"] / peak["1x"], 4)
        sys.stdout.write(f"{stage}: {peak['1x'] / 1e6:.0f} MB, {peak['10x'] / 1e6:.0f} MB, ratio {peak['ratio']:.3f}\n")
        sys.stdout.flush()
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--plain", action="store_true", help="let the allocators return freed memory to the system")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--ipc", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from kills import environment

    peaks = measure(
        args.output, size=args.size, ipc=args.ipc, epochs=args.epochs, env=environment() | (PLAIN if args.plain else {})
    )
    worst = max(peak["ratio"] for peak in peaks.values())
    sys.stdout.write(json.dumps({"worst_ratio": worst}) + "\n")
    if args.record:
        from machine import facts as machine_facts

        from prism_hf.runtime.store import write_json

        pixels = 3 * args.size**2
        scale = f"--size {args.size} --ipc {args.ipc} --epochs {args.epochs}"
        facts = {
            "images": {"1x": 10 * args.ipc, "10x": 100 * args.ipc, "bytes_each": pixels},
            "epochs_of_views": {"1x": max(2, args.epochs // 10), "10x": args.epochs},
            "memory_of_the_machine": psutil.virtual_memory().total,
            "allocators": PLAIN if args.plain else "as they are",
            "command": " ".join(["python benchmarks/memory.py", *(["--plain"] if args.plain else []), scale]),
        }
        write_json(args.record, {"peak_bytes": peaks, "worst_ratio": worst, **facts, **machine_facts()})


if __name__ == "__main__":
    main()
