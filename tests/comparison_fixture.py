"""A comparison in the engine's output format, with real digits and random numbers."""

import copy
import math
import statistics

import numpy as np
import torch
from sklearn.datasets import load_digits

from prism_hf.compare.findings import add_dd_ranking
from prism_hf.evaluation.report import difference

LABELS = ["random real", "SRe2L", "CDA", "G-VBSM", "DWA", "RDED", "PRISM per slot", "PRISM per iteration", "noise"]
EVALUATION = {"epochs": 60, "batch_size": 50, "optimizer": "adamw", "lr": 0.001, "mix": "cutmix", "soft_loss": "kl"}


def make_comparison(*, methods=4, classes=10, ipc=10, seeds=3, students=("test_resnet",), kinds=("soft", "hard")):
    """Return `(comparison, grids)` for `methods` sets of `ipc` digits per class, with their images."""
    random = np.random.default_rng(0)
    digits = load_digits()
    pixels = np.repeat(np.repeat(digits.images * 15.9, 2, 1), 2, 2).astype(np.uint8)[:, None]
    ipcs = ipc if isinstance(ipc, tuple) else (ipc,)
    names = [f"{LABELS[k % len(LABELS)]}{'' if k < len(LABELS) else f' v{k // len(LABELS) + 1}'}" for k in range(methods)]
    comparison = {
        "name": "digits-compare",
        "command": "accelerate launch recipes/compare.py recipes/sre2l.yaml recipes/prism.yaml",
        "data": {
            "source": "digits", "classes": [f"class {k}" if classes > 10 else f"digit {k}" for k in range(classes)],
            "train_count": 1347, "test_count": 450, "tested_on": "test images",
            "license": "CC BY 4.0",
        },
        "protocol": {
            "teachers": {"squeeze:test_resnet": 0.91234, "squeeze:test_byobnet": None},
            "relabel": {"teachers": ["squeeze:test_resnet", "squeeze:test_byobnet"], "ensemble": "mean", "epochs": 60},
            "evaluation": dict(EVALUATION),
            "verifier": "squeeze:test_vit",
            "teacher_seeds": [],
            "notes": ["sre2l: relabel.teachers is [squeeze:test_resnet] in its recipe; the protocol's are used"],
        },
        "methods": [], "scores": [], "full_data": [],
        "real": {
            "similarity": {"mean": 0.512, "per_class": [0.512] * classes},
            "histogram": histogram(random, 0.512, 0.15), "points": points(random, classes, 40, 1.0),
        },
        "map": {"network": "squeeze:test_vit", "how": "first two principal components of real training images' features"},
        "differences": [],
        "left_out": {"full data with soft labels": "not yet run: evaluation.full_data_epochs is 0"},
        "hardware": {"device": "cpu", "threads": 1, "processes": 1},
        "versions": {"prism-hf": "0.3.0", "torch": "2.13.0"},
        "wall_time_s": 4321.5,
    }  # fmt: skip
    grids = {}
    for many in ipcs:
        for place, name in enumerate(names):
            label = name if len(ipcs) == 1 else f"{name}, ipc {many}"
            method, images = one_method(random, label, name, place, classes, many, (digits.target, pixels))
            comparison["methods"].append(method)
            grids[label] = images
            for student in students:
                for kind in kinds:
                    middle = 0.60 + 0.03 * min(place, 7) + 0.02 * (many > 5) - (0.12 if kind == "hard" else 0)
                    row = score(random, middle, seeds)
                    count = many * classes
                    comparison["scores"].append(
                        {
                            "method": label,
                            "student": student,
                            "labels": kind,
                            **row,
                            "count": count,
                            "label_bytes": {"hard": None, "image": 2000.0}.get(kind, 338000.0),
                        }  # fmt: skip
                    )
    for student in students:
        comparison["full_data"].append({"student": student, **score(random, 0.97, seeds), "count": 1347})
    comparison["differences"] = differences(comparison)
    add_dd_ranking(comparison["methods"], comparison["scores"], comparison["full_data"])
    return comparison, grids


def one_method(random, label, name, place, classes, ipc, source):
    target, pixels = source
    mean = 0.5 + 0.05 * (place % 8)
    picked = [random.choice(np.flatnonzero(target == k % 10), ipc) for k in range(classes)]
    images = pixels[np.concatenate(picked)].astype(float)
    noise = random.normal(0, 12.0 * (place % 9), images.shape)
    method = {
        "label": label, "recipe": f"recipe_{place}", "ipc": ipc, "control": name == "random real",
        "recipe_yaml": f"name: recipe_{place}\nsynthesis:\n  ipc: {ipc}  # images per class\n",
        "seconds_per_image": 0.31 * place, "image_bytes": 76800.0 + place,
        "label_bytes": 338000.0, "verifier_top1": 0.98 - 0.01 * place,
        "similarity": {"mean": mean, "per_class": [mean] * classes, "std_over_seeds": 0.004},
        "histogram": histogram(random, mean, 0.1), "grid": f"grids/{place}.png",
        "points": points(random, classes, ipc, 0.4 + 0.1 * place),
    }  # fmt: skip
    if ipc == 1:
        method |= {"similarity": {"mean": None, "per_class": [None] * classes, "std_over_seeds": None}, "histogram": None}
    return method, torch.from_numpy(np.clip(images + noise, 0, 255).astype(np.uint8))


def score(random, middle, seeds):
    top1 = [float(v) for v in np.clip(random.normal(middle, 0.012, seeds), 0, 1).round(4)]
    std = statistics.stdev(top1) if seeds > 1 else None
    return {"seeds": list(range(seeds)), "top1": top1, "mean": statistics.fmean(top1), "std": std}


def histogram(random, mean, spread):
    density, edges = np.histogram(random.normal(mean, spread, 4000).clip(-0.19, 0.99), 48, (-0.2, 1.0), density=True)
    return {"edges": edges.tolist(), "density": density.tolist()}


def points(random, classes, ipc, spread):
    centers = 5 * np.stack([np.cos(np.arange(classes) * 2.4), np.sin(np.arange(classes) * 2.4)], 1)
    centers *= np.sqrt(np.arange(1, classes + 1) / classes)[:, None]
    xy = np.repeat(centers, ipc, 0) + random.normal(0, spread, (classes * ipc, 2))
    return {"xy": xy.round(3).tolist(), "label": np.repeat(np.arange(classes), ipc).tolist()}


def differences(comparison):
    """Return the difference of every later method minus every earlier one with the same ipc, student and labels."""
    ipc = {method["label"]: method["ipc"] for method in comparison["methods"]}
    found = []
    for b, one in enumerate(comparison["scores"]):
        for other in comparison["scores"][b + 1 :]:
            same = all(one[key] == other[key] for key in ("student", "labels")) and other["method"] != one["method"]
            if same and ipc[one["method"]] == ipc[other["method"]]:
                gap, half = difference(other, one)
                found.append({
                    "a": other["method"], "b": one["method"], "student": one["student"], "labels": one["labels"],
                    "difference": gap, "half_width": half if math.isfinite(half) else None,
                })  # fmt: skip
    return found


def make_sparse(comparison):
    """Return the same comparison without any of the optional parts."""
    sparse = copy.deepcopy(comparison)
    sparse |= {"full_data": [], "differences": [], "left_out": {}, "hardware": {}, "versions": {}}
    sparse["protocol"] |= {"verifier": None, "notes": [], "teachers": {}}
    for entry in (sparse["real"], *sparse["methods"]):
        entry |= {"verifier_top1": None, "histogram": None, "similarity": {"mean": None, "std_over_seeds": None}}
    return sparse
