"""What the tests of the pipeline share: a tiny recipe, its command run in process, fingerprints of folders."""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from timm.models import save_for_hf

from prism_hf.command import run_command
from prism_hf.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "digits" / "prism_ipc10.yaml"
TINY = (
    "data.size=16", "synthesis.iterations=4", "synthesis.slots_per_batch=1", "synthesis.batch_size=10",
    "synthesis.ipc=2", "relabel.epochs=2", "relabel.batch_size=10",
    "squeeze.epochs=1", "squeeze.batch_size=128", "teachers.logit=squeeze:test_byobnet",
    "teachers.bn_pool=[squeeze:test_efficientnet]", "teachers.verifier=null",
    "relabel.teachers=[squeeze:test_byobnet]", "evaluation.student=test_byobnet", "evaluation.full_data_epochs=1",
    "evaluation.batch_size=10", "evaluation.seeds=[0,1,2]",
)  # fmt: skip


def tiny(*overrides):
    return load_recipe(RECIPE, [*TINY, *overrides])


def command(name="prism"):
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(*words, name="prism", recipe=RECIPE):
    """One launch of a command in this process, as a new process would start it; its exit code."""
    AcceleratorState._reset_state(True)
    module = command(name)
    return run_command(module.main, module.parse([*([str(recipe)] if recipe else []), *map(str, words)]))


def sha_tree(folder):
    """SHA-256 of each file below a folder."""
    folder = Path(folder)
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def mtimes(folder):
    return {p.as_posix(): p.stat().st_mtime_ns for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def one_line(error):
    text = str(getattr(error, "value", error))
    assert text and "\n" not in text, text
    return text


def random_picture(width, height, mode="RGB", seed=0):
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def save_timm(folder, architecture="test_byobnet", *, classes=3, names=None, seed=0, **cfg):
    """A timm folder with random weights, as `timm.models.save_for_hf` writes it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(architecture, num_classes=classes)
    config = {"num_classes": classes, "pretrained_cfg": {**model.pretrained_cfg, "num_classes": classes, **cfg}}
    if names is not None:
        config["pretrained_cfg"]["label_names"] = list(names)
    save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
    return Path(folder)


def quiet_env():
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "TQDM_DISABLE": "1"}


PYTHON = sys.executable
