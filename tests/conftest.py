import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # our default number of threads: test workers share the cores

import hashlib  # noqa: E402
from collections.abc import Callable, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402

from prism_hf.models.teacher import Teacher, digest_of_tensors
from prism_hf.recipe.schema import Recipe  # noqa: E402
from prism_hf.recipe.yaml_file import parse_recipe

torch.set_num_threads(1)

LONGEST = ("test_readme.py", "test_no_images.py::test_real_imagenet")


def pytest_collection_modifyitems(items):
    """Start the longest tests first: at the end, one worker would wait for the other one."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))


TINY = {
    "name": "tiny",
    "seed": 0,
    "data": {"source": "digits", "num_classes": 3, "size": 32, "channels": 3},
    "teachers": {
        "logit": "test_resnet",
        "bn_pool": ["test_efficientnet", "test_byobnet"],
        "extras": 1,
        "draw_probability": 1.0,
    },
    "synthesis": {
        "ipc": 2,
        "init": "noise",
        "batch_size": 3,
        "iterations": 4,
        "lr": 0.05,
        "view": {"crop_scale": [0.5, 1.0], "flip": True, "jitter": 4},
    },
    "relabel": {"teachers": ["test_resnet", "test_byobnet"], "epochs": 2, "batch_size": 4},
    "evaluation": {"student": "test_resnet", "seeds": [0, 1], "batch_size": 4, "lr": 0.01},
}

MakeRecipe = Callable[..., Recipe]


def tiny_values(changes: Mapping[str, object] | None = None) -> dict[str, object]:
    """Return a minimal valid recipe as plain values, with some dotted keys changed."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section[parent] = dict(section.get(parent) or {})
            section = section[parent]
        section[last] = value
    return values


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny run that has finished its dataset; tests that change it copy it."""
    from pipeline import make

    folder = tmp_path_factory.mktemp("finished") / "run"
    make(folder, folder / "teachers")
    return folder


@pytest.fixture(scope="session")
def compared(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of a finished comparison of PRISM and SRe2L and of its teachers; tests that change it copy it."""
    from comparisons import comparison, named

    from prism_hf.compare.runs import make

    folder = tmp_path_factory.mktemp("compared") / "compare"
    assert make(comparison(folder, finished_run / "teachers", named("prism", "sre2l"))) == {}
    return folder, finished_run / "teachers"


@pytest.fixture(scope="session")
def tiny_recipe() -> MakeRecipe:
    """Return a function: `tiny_recipe({"synthesis.lr": 0.1})` returns a Recipe, or plain values with `values=True`."""

    def make(changes: Mapping[str, object] | None = None, *, values: bool = False) -> Recipe | dict[str, object]:
        plain = tiny_values(changes)
        return plain if values else parse_recipe(plain)

    return make


def make_teacher(name: str, *, seed: int = 0, size: int = 32, num_classes: int = 3, channels: int = 3) -> Teacher:
    """Return a network with random weights whose running statistics come from one batch of random data."""
    architecture = name.partition("#")[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(hashlib.sha256(f"{name}{seed}".encode()).hexdigest()[:8], 16))
        model = timm.create_model(architecture, pretrained=False, num_classes=num_classes, in_chans=channels)
        images = torch.randn(16, channels, size, size) * 0.7 + 0.3
        with torch.no_grad():
            model.train()(images)
            # A new head gives almost the same output for every input; real teachers do not.
            logits, head = model.eval()(images), model.get_classifier()
            scale = 2 / logits.std(0).mean()
            head.weight.mul_(scale)
            head.bias.copy_(scale * (head.bias - logits.mean(0)))
    model.requires_grad_(False).to(memory_format=torch.channels_last)
    shift = 0.05 * len(architecture) % 0.2
    return Teacher(
        name=name,
        model=model,
        mean=(0.4 + shift, 0.5, 0.45)[:channels],
        std=(0.2, 0.25, 0.2 + shift)[:channels],
        size=size,
        num_classes=num_classes,
        architecture=architecture,
        license="apache-2.0",
        revision=None,
        weights_sha256=digest_of_tensors(model.state_dict()),
        label_names=None,
    )


@pytest.fixture(scope="session")
def tiny_teachers() -> dict[str, Teacher]:
    """Return frozen teachers: BatchNorm2d, BatchNormAct2d, and BatchNormAct2d at another input size. Do not change them."""
    sizes = {"test_resnet": 32, "test_efficientnet": 32, "test_byobnet": 40}
    return {name: make_teacher(name, size=size) for name, size in sizes.items()}


@pytest.fixture(scope="session")
def tiny_verifier() -> Teacher:
    return make_teacher("test_efficientnet#verifier", seed=1)


@pytest.fixture(scope="session")
def tiny_images() -> torch.Tensor:
    """Return seven smooth random images, (7, 3, 32, 32) uint8."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand((7, 3, 6, 6), generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear", align_corners=False)
    return (fine * 255).round().to(torch.uint8)
