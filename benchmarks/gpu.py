"""Measure on a GPU everything that is marked *not yet run*, in under ten minutes, and write one JSON.

    python benchmarks/gpu.py --record benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --toy      # tries the command itself; its numbers mean nothing

Parts: the synthesis step at ImageNet's size (throughput.py: 224 pixels, batches of 100) and of the four small
networks, relabeling and students (relabel.py), and a small recipe with one and with two processes, whose images must agree.
A part that fails is recorded with its message, and the others still run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import torch

from prism_hf.runtime import read_tensors, write_json

HERE = Path(__file__).resolve().parent
STEPS_PER_IMAGE = 2550
"""Mean iterations per image of the published ImageNet-1K schedule at 10 images per class: 4000 - 500 * (slot mod 8)."""
TINY = (
    "synthesis.iterations=20", "squeeze.epochs=1", "relabel.epochs=2", "evaluation.seeds=[0]", "evaluation.epochs=2",
    "evaluation.full_data_epochs=0",
)  # fmt: skip
LIMIT_S = 240
"""Longest time of a part."""


def run(*words: str) -> None:
    """Run a Python command, and raise an error with its last line if it fails or takes too long."""
    try:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {LIMIT_S} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])


def recorded(script: str, *options: str) -> dict:
    """Return the JSON that another benchmark records, with an error in it if not all of it was measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        try:
            run(str(HERE / script), *options, "--record", str(path))
        except RuntimeError as error:
            if not path.is_file():
                raise
            return json.loads(path.read_text()) | {"error": str(error)}
        return json.loads(path.read_text())


def speeds(device: str, cases: list[str], *variants: str, toy: bool) -> dict:
    """Return the speeds of steps, and the seconds per image of the published schedule that follow from them."""
    options = ["--device", device, "--threads", "8", "--memory", "--variants", "published", *variants, "--cases", *cases]
    result = recorded(
        "throughput.py",
        *options,
        *([] if toy else ["--batch", "100"]),
        "--rounds",
        "1" if toy else "10",
        "--repeat",
        "1" if toy else "5",
    )
    for case in result["cases"].values():
        for facts in case["variants"].values():
            facts["projected_s_per_image"] = STEPS_PER_IMAGE / facts["image_iterations_per_s"]
    return result


def step(device: str, toy: bool) -> dict:
    """Return the speed of steps at ImageNet's size; compiling takes half a minute per network."""
    cases = ["small20"] if toy else ["resnet18", "three"]
    variants = ["ours", "ours, no graphs", "ours, bf16", "floor", "floor, bf16"]
    if not toy:  # on a CPU, compiling takes minutes
        variants.append("ours, bf16, compiled")
    return speeds(device, cases, *variants, toy=toy)


def small(device: str, toy: bool) -> dict:
    """Return the speed of steps of small networks."""
    return speeds(device, ["small20" if toy else "small100"], "ours", "ours, no graphs", "ours, bf16", "floor", toy=toy)


def relabel(device: str, toy: bool) -> dict:
    """Return the speed of relabeling and of students."""
    return recorded("relabel.py", "--device", device, *(["--toy"] if toy else []))


def processes(device: str, toy: bool) -> dict:
    """Return the largest difference between the images of a run with one process and with two, in levels of 255."""
    if device != "cpu" and torch.cuda.device_count() < 2:
        raise RuntimeError("not yet run: needs two GPUs")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "--num_processes", "2"]
    images = []
    with tempfile.TemporaryDirectory() as folder:
        for name, words in (("one", []), ("two", launch)):
            output = ["--output", f"{folder}/{name}", "--teachers", f"{folder}/teachers", "--threads", "1"]
            run(*words, str(HERE.parent / "recipes" / "prism.py"), *TINY, *output)
            files = sorted(Path(folder, name, "work", "jobs").glob("job-?????.safetensors"))
            images.append(np.concatenate([read_tensors(path)["images_uint8"].numpy().astype(int) for path in files]))
    return {"images": len(images[0]), "largest_difference": int(np.abs(images[0] - images[1]).max())}


def main() -> None:
    """Run all parts and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="the smallest sizes")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, found none; --device cpu --toy tries the command")
    name = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    parts: dict[str, dict] = {}
    for part in (step, relabel, small, processes):
        started = time.perf_counter()
        try:
            parts[part.__name__] = part(args.device, args.toy)
        except RuntimeError as error:
            parts[part.__name__] = {"error": str(error)}
        parts[part.__name__]["seconds"] = round(time.perf_counter() - started, 1)
        sys.stdout.write(f"{part.__name__}: {json.dumps(parts[part.__name__])[:300]}\n")
        sys.stdout.flush()
        if args.record:  # after each part: a later one may not end
            command = f"python benchmarks/gpu.py {' '.join(sys.argv[1:])}"
            write_json(args.record, {"command": command, "device": name, **machine.facts(), "parts": parts})


if __name__ == "__main__":
    main()
