"""Helpers for tests of the pipeline: a tiny recipe, commands that run in this process, and hashes of folders."""

import hashlib
import importlib.util
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from timm.models import save_for_hf

from prism_hf.cli.main import main
from prism_hf.recipe.plan import STAGES
from prism_hf.recipe.yaml_file import dump_recipe, load_recipe
from prism_hf.runtime.store import write_bytes

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


def recipe_script(name):
    """Return a script in recipes/ as a module."""
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(*words, name="distill", recipe=RECIPE, **options):
    """Run a command in this process as if in a new process; return its exit code."""
    AcceleratorState._reset_state(True)
    return main([name, *([str(recipe)] if recipe else []), *map(str, words)], **options)


def run_in(folder, teachers, *overrides, **more):
    """Return a tiny run in this process, created without a command."""
    from prism_hf.run.context import Run, make_accelerator

    AcceleratorState._reset_state(True)
    run = Run(tiny(*overrides), Path(folder), Path(teachers), make_accelerator(folder), **more)
    write_bytes(run.folder / "recipe.yaml", dump_recipe(run.recipe).encode())
    return run


def make(folder, teachers, *overrides, wanted=STAGES[:4], **more):
    """Make a tiny run up to its dataset, and return it."""
    from prism_hf.run.distill import run_stages

    run = run_in(folder, teachers, *overrides, **more)
    run_stages(run, wanted)
    return run


def copy_run(folder, target):
    """Copy a run, keeping its hard links; return the copy."""
    subprocess.run(["cp", "-a", str(folder), str(target)], check=True)
    return Path(target)


def sha_tree(folder):
    """Return the SHA-256 of each file in a folder and its subfolders."""
    folder = Path(folder)
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def mtimes(folder):
    return {p.as_posix(): p.stat().st_mtime_ns for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@contextmanager
def file_limit(count):
    """Limit every file of this process to `count` bytes, so that writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def one_line(error):
    text = str(getattr(error, "value", error))
    assert text
    assert "\n" not in text, text
    return text


def random_picture(width, height, mode="RGB", seed=0):
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def save_timm(folder, architecture="test_byobnet", *, classes=3, names=None, seed=0, **cfg):
    """Save a timm folder with random weights, as `timm.models.save_for_hf` writes it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(architecture, num_classes=classes)
    config = {"num_classes": classes, "pretrained_cfg": {**model.pretrained_cfg, "num_classes": classes, **cfg}}
    if names is not None:
        config["pretrained_cfg"]["label_names"] = list(names)
    save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
    return Path(folder)


def quiet_env():
    """Return the environment for a separate process that runs the code of this checkout."""
    here = {"PYTHONPATH": str(ROOT / "src")}
    return os.environ | here | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


PYTHON = sys.executable


def small_set(folder, *, channels=1, size=12, mix="cutmix", image_format="png", epochs=3, ipc=3, names=None, shard_mb=500,
              classes=None, seed=0, name=None, overrides=()):  # fmt: skip
    """Write a dataset folder with tables but without provenance and card; return its contents."""
    from prism_hf.dataset.writer import ImageRows, build_dataset
    from prism_hf.images.pixels import decode, encode
    from prism_hf.images.views import draw_views, to_columns
    from prism_hf.runtime.seeds import derived_seed

    names = list(names or [f"class {i}" for i in range(classes or 4)])
    count, generator = len(names) * ipc, torch.Generator().manual_seed(seed)
    recipe = tiny(
        f"data.channels={channels}", f"data.size={size}", f"data.num_classes={len(names)}", f"synthesis.ipc={ipc}",
        f"relabel.epochs={epochs}", "relabel.batch_size=2", "synthesis.batch_size=2", f"relabel.view.mix={mix}",
        f"packaging.image_format={image_format}", f"packaging.shard_megabytes={shard_mb}",
        *([f"name={name}"] if name else []), *overrides,
    )  # fmt: skip
    pixels = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    encoded = [encode(image, image_format, jpeg_quality=90) for image in pixels]
    table = ImageRows(
        encoded=encoded,
        labels=torch.arange(len(names)).repeat_interleave(ipc),
        slots=torch.arange(ipc).repeat(len(names)),
        jobs=torch.arange(count) % 3,
        teacher_logits=torch.randn((count, len(names)), generator=generator).half(),
    )
    views = []
    for epoch in range(epochs):
        own = torch.Generator().manual_seed(derived_seed(seed, epoch))
        order, parts = torch.randperm(count, generator=own), []
        for number, rows in enumerate(order.split(6)):
            view = draw_views(len(rows), size, own, crop_scale=(0.3, 1.0), flip=True, mix=mix)
            columns = {"epoch": np.full(len(rows), epoch, np.int32), "batch": np.full(len(rows), number, np.int32)}
            columns |= to_columns(view, rows)
            columns["teacher_logits"] = torch.randn((len(rows), len(names)), generator=own).half().numpy()
            parts.append(columns)
        views.append({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    build_dataset(folder, table, views, recipe=recipe, class_names=names)
    shown = torch.stack([decode(data, channels) for data in encoded])
    return recipe, names, table, views, shown


def add_card(folder, recipe, names, *, teachers=None, report=None, images="distilled"):
    """Add provenance and a card to a `small_set`, so that the `datasets` library finds both configs."""
    from prism_hf.dataset.provenance import write_provenance
    from prism_hf.hub.dataset_card import card_facts, render_card

    write_provenance(
        folder, recipe=recipe, teachers=teachers or {}, source_revision=None, source_on_hub=False, squeezed_top1={},
        images=images,
        hardware={"device": "cpu", "threads": 1, "precision": "float32"},
    )  # fmt: skip
    facts = card_facts(folder, recipe, names, report)
    (folder / "README.md").write_text(render_card(facts, recipe), encoding="utf-8")
    return facts
