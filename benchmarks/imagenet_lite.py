"""Compare PRISM, SRe2L and G-VBSM from noise with real ImageNet-1K teachers, scored by a network that is held out.

    python recipes/imagenet/lite_teachers.py outputs/lite
    python benchmarks/imagenet_lite.py --record benchmarks/results/imagenet-lite.json

The losses use all 1000 logits, and the images are of every n-th class. All methods have the same number of iterations,
start images, views and learning rate. G-VBSM is its BN part (teachers in turn, moving averages): its other statistics need
real images. The score is the top-1 and top-5 among 1000 classes of EfficientNet-Lite2, which is in no loss. No student is
trained, since there is no real image to test one on.
"""

import argparse
import sys
import time
from pathlib import Path

import machine
import torch

from prism_hf import distill, load_distilled, load_teachers
from prism_hf.errors import DataError
from prism_hf.evaluation import intra_class_similarity
from prism_hf.images import find_classes, to_reference
from prism_hf.models import penultimate_features
from prism_hf.runtime import write_json

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "imagenet" / "lite_ipc1.yaml"
METHODS: dict[str, dict[str, object]] = {
    "PRISM": {},
    "SRe2L": {"teachers.bn_pool": [], "teachers.extras": 3, "teachers.draw_probability": 0.5},
    "G-VBSM, BN only": {
        "teachers.selection": "cycle", "teachers.extras": 3, "teachers.draw_probability": 0.5, "synthesis.momentum": 0.4,
    },
}  # fmt: skip


def score(dataset: Path, held_out: str) -> dict[str, float | None]:
    """Return the held-out top-1 and top-5 among all classes, and the mean similarity of images of one class."""
    images, teacher = load_distilled(dataset), load_teachers([held_out], device=torch.device("cpu"))[held_out]
    assert teacher.label_names is not None
    numbers = torch.tensor(find_classes(images.class_names, teacher.label_names, held_out, DataError))
    truth = numbers[images.labels]
    with torch.no_grad():
        logits = torch.cat([teacher.logits(to_reference(part)) for part in images.images_uint8.split(20)])
    ranks = (logits > logits.gather(1, truth[:, None])).sum(1)
    parts = penultimate_features(teacher, lambda rows: images.images_uint8[rows.start : rows.stop], len(truth))
    features = torch.cat([part for _, part in parts])
    return {
        "top1": float((ranks < 1).float().mean()),
        "top5": float((ranks < 5).float().mean()),
        "similarity": intra_class_similarity(features, images.labels, len(images.class_names)).mean,
    }


def main() -> None:
    """Run the methods one after the other, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=20, help="number of classes, evenly spaced")
    parser.add_argument("--ipc", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("outputs/imagenet-lite"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--record", type=Path)
    args, results = parser.parse_args(), {}
    common = {
        "data.classes": list(range(0, 1000, 1000 // args.classes))[: args.classes],
        "data.class_logits": "full",
        "synthesis.ipc": args.ipc,
        "synthesis.iterations": args.iterations,
        "synthesis.batch_size": min(20, args.classes),
        "relabel.epochs": 1,
        "relabel.batch_size": min(50, args.classes * args.ipc),
        "evaluation.epochs": 1,
    }
    for method in args.methods:
        started, folder = time.perf_counter(), args.output / method.split(",")[0].lower()
        distill(RECIPE, folder, common | METHODS[method], teachers=args.output / "teachers")
        spent = time.perf_counter() - started
        facts = score(folder / "dataset", "local-dir:outputs/lite/lite2")
        results[method] = facts | {"s_per_image": spent / (args.classes * args.ipc)}
        sys.stdout.write(f"{method}: {results[method]}\n")
        sys.stdout.flush()
        if args.record:
            command = f"python benchmarks/imagenet_lite.py {' '.join(sys.argv[1:])}"
            settings = {"classes": args.classes, "ipc": args.ipc, "iterations": args.iterations}
            write_json(args.record, {"command": command, **settings, **machine.facts(), "methods": results})


if __name__ == "__main__":
    main()
