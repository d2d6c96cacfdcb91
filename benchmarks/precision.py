"""Compare the same jobs in bf16 and float32: the difference between the images, and the scores that networks give them.

python benchmarks/precision.py RECIPE.yaml --teachers outputs/teachers --record benchmarks/results/precision.json
"""

import argparse
import sys
import time
from pathlib import Path

import machine
import torch

from prism_hf.images.pixels import noise, to_reference
from prism_hf.images.source import load_source
from prism_hf.method.start_images import real_rows
from prism_hf.models.load import load_teachers
from prism_hf.models.squeeze import teacher_folder
from prism_hf.recipe.plan import plan_jobs
from prism_hf.recipe.yaml_file import load_recipe
from prism_hf.run.optimize import optimize
from prism_hf.runtime.store import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--teachers", type=Path, required=True)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [*recipe.teachers.synthesis_names, *([recipe.teachers.verifier] if recipe.teachers.verifier else [])]
    squeezed = {name: teacher_folder(name, recipe, args.teachers) for name in names}
    teachers = load_teachers(names, device=device, squeezed=squeezed)
    verifier = teachers.pop(recipe.teachers.verifier) if recipe.teachers.verifier else None
    data, synthesis = load_source(recipe.data), recipe.synthesis
    rows = real_rows(data, synthesis.ipc, seed=recipe.seed)
    measured: dict[str, list[dict[str, float]]] = {"float32": [], "bf16": []}
    differences: list[float] = []
    for job in plan_jobs(recipe):
        if synthesis.init == "noise":
            shape = (len(job.classes), recipe.data.channels, recipe.data.size, recipe.data.size)
            start = noise(shape, torch.Generator().manual_seed(job.seed + 1))
        else:
            indices = [c * synthesis.ipc + s for c, s in zip(job.classes, job.slots, strict=True)]
            start = to_reference(data.train.images(rows[indices]))
        images = {}
        for precision, results in measured.items():
            began = time.perf_counter()
            result = optimize(job, synthesis, start.to(device), teachers, verifier=verifier, precision=precision)
            last = result.history[-1]
            images[precision] = result.images_uint8.float()
            results.append(
                {
                    "ce": last["ce"],
                    "bn": last["bn"],
                    "logit_top1": result.logit_top1,
                    "verifier_top1": result.verifier_top1 or 0.0,
                    "seconds": time.perf_counter() - began,
                }
            )
        differences.append(float((images["bf16"] - images["float32"]).abs().mean()))

    def mean(precision: str, key: str) -> float:
        return sum(entry[key] for entry in measured[precision]) / len(measured[precision])

    means = {p: {key: round(mean(p, key), 4) for key in measured[p][0]} for p in measured}
    facts = {
        "recipe": recipe.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "jobs": len(differences),
        "mean_absolute_difference_of_8_bit_levels": round(sum(differences) / len(differences), 3),
        **means,
        "command": " ".join(["python benchmarks/precision.py", str(args.recipe), *args.overrides]),
        **machine.facts(),
    }
    sys.stdout.write(f"{facts}\n")
    if args.record:
        write_json(args.record, facts)


if __name__ == "__main__":
    main()
