# ruff: noqa: F811
"""User errors, one case each: a helpful one-line message, exit code 2, and no file written or changed."""

import json
import pickle
import shlex
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import yaml
from foreign_tables import FEATURES, NAMES, rows
from foreign_teachers import resnet
from hub_fixtures import connected, hub, online, transport  # noqa: F401
from hub_server import CutBody, HubServer, Status
from pipeline import add_card, launch, random_picture, save_timm, sha_tree, small_set, tiny

from prism_hf.cli.main import main as console
from prism_hf.errors import DataError, HubError, OutputError, RecipeError, StageError, TeacherError
from prism_hf.recipe.schema import to_dict
from prism_hf.recipe.yaml_file import dump_recipe, override_recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

# -- a valid run; each case gets a copy of its folder -----------------------------------------------------------------

GOOD = (
    "data.source=pictures",
    "data.num_classes=3",
    "data.channels=3",
    "synthesis.batch_size=3",
    "relabel.batch_size=3",
    "squeeze.batch_size=4",
    "evaluation.batch_size=3",
    "name=good",
    "packaging.shard_megabytes=1",
)


def values():
    return to_dict(tiny(*GOOD))


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    """Return a folder with good.yaml, its images, a timm and a transformers teacher for them, and a dataset."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "good.yaml").write_text(dump_recipe(tiny(*GOOD)), encoding="utf-8")
    datasets.DatasetDict({"train": rows(4), "test": rows(2, offset=100)}).save_to_disk(folder / "pictures")
    save_timm(folder / "net", names=NAMES)
    resnet(folder / "resnet", names=NAMES)
    recipe, names, *_ = small_set(folder / "set", names=NAMES, channels=3)
    recipe = override_recipe(recipe, ["data.source=pictures"])
    (folder / "set" / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    add_card(folder / "set", recipe, names)
    return folder


@pytest.fixture
def here(stock, tmp_path, monkeypatch):
    """Make a copy of the stock folder the working folder, and return it."""
    folder = Path(shutil.copytree(stock, tmp_path / "here"))
    monkeypatch.chdir(folder)
    return folder


def state(folder, draft=False):
    """Return every file's hash, and the modification time of every file and folder."""
    paths = [*sorted(folder.rglob("*")), *(() if draft else (folder,))]
    return sha_tree(folder), {str(path): path.lstat().st_mtime_ns for path in paths}


# -- a case -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A command, the expected error and its words, and a function that first damages the folder."""

    words: str
    error: type[Exception]
    says: tuple[str, ...]
    make: Callable[[Path], object] = lambda here: None
    draft: bool = False
    """True if a draft is written and removed before the error, which changes the time of the working folder."""


def run(words):
    program, *rest = shlex.split(words)
    if program == "prism-hf":
        return console(rest)
    command = {"prism.py": "distill"}.get(program, program.removesuffix(".py"))
    return launch(*rest, "--threads", "1", name=command, recipe=None)


def check(bad, folder, capsys):
    """Check for one line on stderr and exit code 2, the exception itself with --debug, and an unchanged folder."""
    bad.make(folder)
    before = state(folder, bad.draft)
    capsys.readouterr()
    assert run(bad.words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"{bad.error.__name__}: ")
    assert "Traceback" not in line
    assert len(line) < 2000
    missing = [word for word in bad.says if word not in line]
    assert not missing, line
    assert state(folder, bad.draft) == before, "something was written"
    with pytest.raises(bad.error) as raised:
        run(f"{bad.words} --debug")
    assert type(raised.value) is bad.error
    capsys.readouterr()
    assert state(folder, bad.draft) == before, "something was written"


def test_the_unmodified_folder_is_accepted(here, capsys):
    """Errors in the cases below are caused by the cases themselves."""
    words = "good.yaml teachers.logit=local-dir:net relabel.teachers=[transformers:resnet] --output out"
    for stage in ("squeeze", "synthesize", "relabel", "package"):
        assert run(f"prism.py {words} --stage {stage}") == 0
    assert run("squeeze.py good.yaml --output teachers") == 0
    assert run("prism-hf verify out/dataset") == 0
    assert run("prism-hf export out/dataset folders --format imagefolder") == 0
    assert run("evaluate.py out/dataset --seeds 1 --output e evaluation.full_data_epochs=0") == 0


# -- recipes ----------------------------------------------------------------------------------------------------------


def write(name, content):
    """Return a step that writes a file (and its parent folders) from text, bytes, or any JSON value."""

    def make(here):
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    return make


def all_of(*steps):
    def make(here):
        for step in steps:
            step(here)

    return make


def remove(*names):
    def make(here):
        for name in names:
            path = here / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def folder(name):
    return lambda here: (here / name).mkdir(parents=True)


TEXT = dump_recipe(tiny(*GOOD))
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))

FILES = {
    "a folder": (folder("bad.yaml"), ["bad.yaml", "cannot be read", "path of a YAML file"]),
    "binary": (write("bad.yaml", bytes(range(256)) * 8), ["bad.yaml", "cannot be read", "UTF-8"]),
    "latin-1": (write("bad.yaml", TEXT.replace("CC BY", "à voir").encode("latin-1")), ["bad.yaml", "UTF-8"]),
    "UTF-16": (write("bad.yaml", TEXT.encode("utf-16")), ["bad.yaml", "UTF-8"]),
    "control characters": (write("bad.yaml", TEXT + "\x00"), ["bad.yaml", "not valid YAML"]),
    "empty": (write("bad.yaml", ""), ["bad.yaml", "expected a mapping of sections", "NoneType"]),
    "a list": (write("bad.yaml", "- name: x\n- seed: 1\n"), ["bad.yaml", "expected a mapping of sections", "list"]),
    "a sentence": (write("bad.yaml", "ten images per class"), ["bad.yaml", "expected a mapping of sections", "str"]),
    "an open bracket": (write("bad.yaml", "data: {source: digits"), ["bad.yaml", "not valid YAML", "line 1"]),
    "a tab": (write("bad.yaml", "data:\n\tsource: digits\n"), ["bad.yaml", "not valid YAML", "line 2"]),
    "two documents": (write("bad.yaml", f"{TEXT}---\n{TEXT}"), ["bad.yaml", "not valid YAML", "single document"]),
    "a key twice": (write("bad.yaml", TEXT + "seed: 1\n"), ["bad.yaml", "'seed' appears twice", "line "]),
    "a section twice": (write("bad.yaml", TEXT + "data: {size: 8}\n"), ["bad.yaml", "'data' appears twice"]),
    "merge keys": (write("bad.yaml", "a: &a {x: 1}\nb: {<<: *a}\n"), ["bad.yaml", "merge keys (<<)"]),
    "billions of values": (write("bad.yaml", BOMB), ["bad.yaml", "more than 16 aliases", "write the values out"]),
    "a part of itself": (write("bad.yaml", "data: &d\n  source: *d\n"), ["bad.yaml", "more than 10,000 values", "aliases"]),
    "endless nesting": (write("bad.yaml", "a: " + "[" * 2000), ["bad.yaml", "nested too deeply", "expected sections"]),
    "a Python object": (
        write("bad.yaml", "name: !!python/object/apply:os.mkdir [owned]\n"),
        ["bad.yaml", "not valid YAML", "python/object"],
    ),
    "an unknown tag": (write("bad.yaml", "data: !source digits\n"), ["bad.yaml", "not valid YAML", "!source"]),
    "a wrong tag": (
        write("bad.yaml", "seed: !!timestamp soon\n"),
        ["bad.yaml", "tag 'timestamp'", "line 1", "remove it"],
    ),
    "a wrong value of a tag": (
        write("bad.yaml", "seed: !!int soon\n"),
        ["bad.yaml", "looks like int", "line 1", "quote it"],
    ),
    "a day for a number": (write("bad.yaml", TEXT.replace("size: 16", "size: 2024-01-01")), ["data.size", '"2024-01-01"']),
    "a number of 5000 digits": (write("bad.yaml", "seed: " + "9" * 5000), ["bad.yaml", "looks like int", "line 1"]),
    "half a character": (
        write("bad.yaml", f'{TEXT}x: "\\ud800"\n'),
        ["bad.yaml", "a value cannot be used", "plain YAML values"],
    ),
    "sixty unknown keys": (
        write("bad.yaml", TEXT + "".join(f"x{i}: 1\n" for i in range(60))),
        ["unknown key 'x0'", "expected one of", "55 more"],
    ),
}

LONG = "x" * 300

VALUES = {
    "unknown key": ({"synthesis.iteration": 3}, ["'synthesis.iteration'", "did you mean 'iterations'?"]),
    "unknown section": ({"evaluate": {}}, ["'evaluate'", "did you mean 'evaluation'?"]),
    "a key of 300 letters": ({f"data.{LONG}": 1}, ["unknown key", "data.xxx"]),
    "a number as key": ({"data.7": 1}, ["'data.7'", "expected one of: source"]),
    "no section": ({"data": None}, ["data", "null"]),
    "a list for a section": ({"relabel": ["squeeze:test_byobnet"]}, ["relabel", "object"]),
    "text for a number": ({"synthesis.ipc": "ten"}, ["synthesis.ipc", "integer", '"ten"']),
    "a fraction for a count": ({"synthesis.ipc": 1.5}, ["synthesis.ipc", "integer", "1.5"]),
    "a number for text": ({"data.source": 7}, ["data.source", "string", "7"]),
    "a number for a switch": ({"relabel.view.flip": 1}, ["relabel.view.flip", "boolean", "1"]),
    "null for a number": ({"synthesis.lr": None}, ["synthesis.lr", "number", "null"]),
    "not a number": ({"synthesis.lr": float("nan")}, ["synthesis.lr", "finite", "NaN"]),
    "not a number, as text": ({"synthesis.lr": "nan"}, ["synthesis.lr", "number", '"nan"']),
    "infinite": ({"synthesis.bn_weight": float("inf")}, ["synthesis.bn_weight", "finite", "Infinity"]),
    "too large to be finite": ({"squeeze.lr": "1e999"}, ["squeeze.lr", "finite"]),
    "negative": ({"synthesis.lr": -0.1}, ["synthesis.lr", "greater than 0", "-0.1"]),
    "zero": ({"relabel.epochs": 0}, ["relabel.epochs", "greater than or equal to 1"]),
    "a huge count": ({"synthesis.iterations": 10**12}, ["synthesis.iterations", "less than or equal to"]),
    "a huge image": ({"data.size": 10**6}, ["data.size", "less than 32768"]),
    "a huge seed": ({"seed": 2**64}, ["seed", "less than"]),
    "a hundred million images": ({"synthesis.ipc": 10**8}, ["synthesis.ipc 100000000", "10,000,000", "lower ipc"]),
    "a name that leads away": ({"name": "../../etc/x"}, ["name", "pattern", "../../etc/x"]),
    "an absolute name": ({"name": "/tmp/x"}, ["name", "pattern"]),
    "no name": ({"name": ""}, ["name", "pattern"]),
    "an unknown color": ({"data.background": "nope"}, ["data.background", "opaque color", "'nope'", "`#rrggbb`"]),
    "a transparent color": ({"data.background": "#00000000"}, ["data.background", "opaque color"]),
    "no source": ({"data.source": ""}, ["data.source", "at least 1 character"]),
    "two channels": ({"data.channels": 2}, ["data.channels", "1 or 3"]),
    "one class": ({"data.num_classes": 1}, ["data.num_classes", "greater than or equal to 2"]),
    "all of it held out": ({"data.validation_fraction": 1.0}, ["data.validation_fraction", "less than 1"]),
    "an unknown init": ({"synthesis.init": "zeros"}, ["synthesis.init", "'noise'", '"zeros"']),
    "nobody labels": ({"relabel.teachers": []}, ["relabel.teachers", "at least 1 item"]),
    "no seeds": ({"evaluation.seeds": []}, ["evaluation.seeds", "at least 1 item"]),
    "a seed twice": ({"evaluation.seeds": [1, 1]}, ["seeds must differ"]),
    "a BN teacher twice": ({"teachers.bn_pool": ["resnet18", "resnet18"]}, ["bn_pool names a teacher twice"]),
    "the logit teacher in the pool": ({"teachers.bn_pool": ["squeeze:test_byobnet"]}, ["bn_pool", "remove it there"]),
    "a teacher as judge": ({"teachers.verifier": "squeeze:test_byobnet"}, ["verifier", "name another architecture"]),
    "no BN teacher": ({"teachers.bn_pool": [], "teachers.include_logit": False}, ["no BN teacher", "set one of the two"]),
    "weights without their ensemble": ({"relabel.weights": [1.0]}, ["ensemble weighted", "set both or neither"]),
    "a crop upside down": ({"relabel.view.crop_scale": [0.9, 0.1]}, ["relabel.view.crop_scale", "swap the two"]),
    "a crop of three numbers": ({"squeeze.crop_scale": [0.1, 0.5, 1.0]}, ["squeeze.crop_scale", "2 items"]),
    "a beta of one": ({"synthesis.betas": [0.5, 1.0]}, ["synthesis.betas.1", "less than 1"]),
    "a ladder too long": ({"synthesis.ladder": {"step": 4, "period": 2}}, ["ladder", "raise iterations"]),
    "a ladder without period": ({"synthesis.ladder": {"step": 1}}, ["'synthesis.ladder.period' is missing"]),
    "gray WebP": ({"data.channels": 1, "packaging.image_format": "webp"}, ["webp has no gray mode", "use png"]),
    "a batch above all images": (
        {"relabel.batch_size": 99},
        ["relabel.batch_size is 99", "6 images", "set relabel.batch_size=6"],
    ),
    "more epochs than views": ({"evaluation.epochs": 9}, ["evaluation.epochs is 9", "raise relabel.epochs"]),
}


def with_values(changes):
    """Return a step that writes bad.yaml: the valid recipe with some dotted keys changed."""

    def make(here):
        recipe = values()
        for key, value in changes.items():
            section = recipe
            *parents, last = key.split(".")
            for parent in parents:
                section[parent] = section[parent] if isinstance(section.get(parent), dict) else {}
                section = section[parent]
            section[int(last) if last.isdigit() else last] = value
        (here / "bad.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    return make


OVERRIDES = {
    "no equals sign": ("synthesis.ipc", ["one recipe", "synthesis.ipc", "key=value"]),
    "two recipes": ("other.yaml", ["one recipe", "other.yaml", "key=value"]),
    "no key": ("=3", ["'=3'", "expected dotted.key=value"]),
    "a dot without a key": ("synthesis.=3", ["'synthesis.'", "expected one of"]),
    "a section for a value": ("data=digits", ["data", "object", '"digits"']),
    "a value for a section": ("synthesis.lr.first=3", ["'synthesis.lr' is a value, not a section"]),
    "unknown key": ("synthesis.itertions=3", ["did you mean 'iterations'?"]),
    "unknown section": ("synth.ipc=3", ["'synth'"]),
    "no YAML": ("'teachers.bn_pool=[squeeze:test_byobnet'", ["teachers.bn_pool", "not valid YAML"]),
    "a part of itself": ("'teachers.bn_pool=&a [*a]'", ["more than 10,000 values"]),
    "a tag": ("'name=!!python/object:os.system x'", ["not valid YAML", "python/object"]),
    "a day for a number": ("data.size=2024-02-30", ["data.size", '"2024-02-30"']),
    "text": ("synthesis.ipc=many", ["synthesis.ipc", "integer", '"many"']),
    "a name that leads away": ("name=../x", ["name", "pattern"]),
    "an impossible mix": ("evaluation.epochs=3", ["evaluation.epochs is 3", "relabel stores 2"]),
}

CASES = {
    "recipe: missing": Bad("prism.py gone.yaml", RecipeError, ("gone.yaml", "not found", "give a YAML file")),
    "recipe: missing, squeeze": Bad("squeeze.py gone.yaml", RecipeError, ("gone.yaml", "not found")),
    "recipe: nothing to squeeze": Bad(
        "squeeze.py good.yaml teachers.logit=resnet18 teachers.bn_pool=[] relabel.teachers=[resnet18]",
        RecipeError,
        ("good.yaml", "does not name a `squeeze:` teacher"),
    ),
    "recipe: a name of two lines": Bad("prism.py 'bad\nname.yaml'", RecipeError, ("bad\\nname.yaml", "not found")),
    "recipe: a file name of two lines": Bad(
        "prism.py 'bad\nname.yaml'",
        RecipeError,
        ("bad name.yaml", "'name' is missing", "2 more"),
        write("bad\nname.yaml", "x: 1"),
    ),
    **{f"recipe: {name}": Bad("prism.py bad.yaml", RecipeError, tuple(says), make) for name, (make, says) in FILES.items()},
    **{
        f"value: {name}": Bad("prism.py bad.yaml --dry-run", RecipeError, ("bad.yaml", *says), with_values(changes))
        for name, (changes, says) in VALUES.items()
    },
    **{
        f"override: {name}": Bad(f"prism.py good.yaml {word}", RecipeError, tuple(says))
        for name, (word, says) in OVERRIDES.items()
    },
    "override: of 300 letters": Bad(
        f"prism.py good.yaml data.licenses={LONG}",
        RecipeError,
        ("license'?",),
    ),
    "override: in another command": Bad("squeeze.py good.yaml squeeze.lr=fast", RecipeError, ("squeeze.lr", '"fast"')),
}

# -- teachers ---------------------------------------------------------------------------------------------------------


def copied(source, target, *steps):
    return all_of(lambda here: shutil.copytree(here / source, here / target), *steps)


def config(name, change):
    """Return a step that changes a folder's config.json."""

    def make(here):
        path = here / name / "config.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


def cfg(**values):
    """Return a step that copies the valid timm folder and changes its pretrained_cfg."""
    return copied("net", "bad", config("bad", lambda content: content["pretrained_cfg"].update(values)))


def cut(name, share=0.5):
    def make(here):
        data = (here / name).read_bytes()
        (here / name).write_bytes(data[: int(len(data) * share)])

    return make


class Trap:
    """An object that creates a folder when it is unpickled."""

    def __reduce__(self):
        return Path.mkdir, (Path("trapped"),)


pickled = write("bad/pytorch_model.bin", pickle.dumps(Trap()))


def gray(here):
    model = timm.create_model("test_byobnet", num_classes=3, in_chans=1)
    own = {"input_size": [1, 16, 16], "mean": [0.5], "std": [0.5], "num_classes": 3}
    content = {"num_classes": 3, "model_args": {"in_chans": 1}, "pretrained_cfg": {**model.pretrained_cfg, **own}}
    timm.models.save_for_hf(model, str(here / "bad"), model_config=content, safe_serialization=True)


TEACHERS = {
    "no architecture": ("resnet1800.tv_in1k", ["no such architecture", "similar: resnet1"]),
    "no such weights": ("resnet18.nobody", ["no weights with that name", "resnet18.a1_in1k"]),
    "no scheme": ("net", ["no such architecture"]),
    "another scheme": ("timm:resnet18", ["other sources are squeeze:ARCH", "hf-hub:ORG/NAME"]),
    "a Hub id without scheme": ("timm/resnet18.a1_in1k", ["other sources are", "hf-hub:ORG/NAME"]),
    "no folder": ("local-dir:gone", ["gone has no config.json or model.safetensors", "expected a timm folder"]),
    "no path": ("'local-dir:'", ["has no config.json"]),
    "a file for a folder": ("local-dir:good.yaml", ["good.yaml has no config.json", "expected a timm folder"]),
    "an empty folder": ("local-dir:bad", ["no config.json", "model.safetensors"], folder("bad")),
    "no config": ("local-dir:bad", ["bad has no config.json"], copied("net", "bad", remove("bad/config.json"))),
    "no weights": (
        "local-dir:bad",
        ["bad has no model.safetensors"],
        copied("net", "bad", remove("bad/model.safetensors")),
    ),
    "pickled weights": (
        "local-dir:bad",
        ["no model.safetensors", "pickled weights are not loaded"],
        copied("net", "bad", remove("bad/model.safetensors"), pickled),
    ),
    "half a config": ("local-dir:bad", ["config.json"], copied("net", "bad", cut("bad/config.json"))),
    "a config of another kind": (
        "local-dir:bad",
        ["config.json", "transformers:"],
        copied("net", "bad", write("bad/config.json", [])),
    ),
    "a binary config": ("local-dir:bad", ["config.json"], copied("net", "bad", write("bad/config.json", b"\xff\x00"))),
    "an unknown architecture inside": (
        "local-dir:bad",
        ["no architecture 'nonsense'"],
        copied("net", "bad", config("bad", lambda content: content.update(architecture="nonsense"))),
    ),
    "half the weights": ("local-dir:bad", ["safetensors"], copied("net", "bad", cut("bad/model.safetensors"))),
    "weights of no bytes": ("local-dir:bad", ["safetensors"], copied("net", "bad", write("bad/model.safetensors", b""))),
    "weights of another network": (
        "local-dir:bad",
        ["cannot be loaded", "match each other"],
        copied("net", "bad", config("bad", lambda content: content.update(architecture="test_resnet"))),
    ),
    "an argument that nobody knows": (
        "local-dir:bad",
        ["cannot be loaded"],
        copied("net", "bad", config("bad", lambda content: content.update(model_args={"nonsense": 1}))),
    ),
    "two class counts": (
        "local-dir:bad",
        ["cannot be loaded", "size mismatch", "match each other"],
        copied("net", "bad", config("bad", lambda content: content.update(model_args={"num_classes": 7}, num_classes=7))),
    ),
    "a mean of two numbers": ("local-dir:bad", ["mean is [0.5, 0.5]", "expected 3 numbers"], cfg(mean=[0.5, 0.5])),
    "a mean in words": ("local-dir:bad", ["has 'abc' as 'mean'", "valid array"], cfg(mean="abc")),
    "a deviation of zero": ("local-dir:bad", ["'std.1'", "greater than 0"], cfg(std=[0.2, 0.0, 0.2])),
    "no input size": ("local-dir:bad", ["[3, 32] as 'input_size'", "at least 3 items"], cfg(input_size=[3, 32])),
    "an input size in words": ("local-dir:bad", ["input_size"], cfg(input_size="large")),
    "a negative input size": ("local-dir:bad", ["input_size"], cfg(input_size=[3, -1, -1])),
    "label names that are a number": ("local-dir:bad", ["label_names"], cfg(label_names=3)),
    "more classes": ("local-dir:bad", ["7 classes", "the data has 3"], lambda here: save_timm(here / "bad", classes=7)),
    "a class that it does not know": (
        "local-dir:bad",
        ["class 'bee'", "3 classes of teacher"],
        lambda here: save_timm(here / "bad", names=("cat", "dog", "ant")),
    ),
    "no BatchNorm": (
        "local-dir:bad",
        ["no BatchNorm layer", "bad"],
        lambda here: save_timm(here / "bad", "test_nfnet", names=NAMES),
    ),
    "gray": ("local-dir:bad", ["1 channel", "the data has 3"], gray),
    "transformers, a timm folder cut": (
        "transformers:bad",
        ["cannot be loaded"],
        copied("net", "bad", cut("bad/model.safetensors")),
    ),
    "transformers, no folder": ("transformers:./gone", ["neither a Hub id", "nor, for transformers, a folder"]),
    "transformers, empty": ("transformers:bad", ["cannot be loaded"], folder("bad")),
    "transformers, no config": (
        "transformers:bad",
        ["cannot be loaded"],
        copied("resnet", "bad", remove("bad/config.json")),
    ),
    "transformers, half a config": (
        "transformers:bad",
        ["cannot be loaded"],
        copied("resnet", "bad", cut("bad/config.json")),
    ),
    "transformers, half the weights": (
        "transformers:bad",
        ["cannot be loaded"],
        copied("resnet", "bad", cut("bad/model.safetensors")),
    ),
    "transformers, pickled weights": (
        "transformers:bad",
        ["cannot be loaded", "safetensors"],
        copied("resnet", "bad", remove("bad/model.safetensors"), pickled),
    ),
    "transformers, code of its own": (
        "transformers:bad",
        ["cannot be loaded"],
        copied(
            "resnet",
            "bad",
            write("bad/code.py", "raise SystemExit"),
            config(
                "bad",
                lambda content: content.update(
                    model_type="own", auto_map={"AutoConfig": "code.C", "AutoModelForImageClassification": "code.M"}
                ),
            ),
        ),
    ),
    "transformers, an adapter": (
        "transformers:bad",
        ["adapter_config.json", "merge the two"],
        copied("resnet", "bad", write("bad/adapter_config.json", {})),
    ),
    "transformers, shards elsewhere": (
        "transformers:bad",
        ["cannot be loaded", "../net"],
        copied(
            "resnet",
            "bad",
            remove("bad/model.safetensors"),
            write("bad/model.safetensors.index.json", {"weight_map": {"a": "../net/model.safetensors"}}),
        ),
    ),
    "transformers, labels without numbers": (
        "transformers:bad",
        ["cannot be loaded"],
        copied(
            "resnet", "bad", config("bad", lambda content: content.update(id2label={"5": "ant", "6": "bee", "x": "cat"}))
        ),
    ),
    "transformers, no processor": (
        "transformers:bad",
        ["no preprocessor_config.json", "save the image processor too"],
        copied("resnet", "bad", remove("bad/preprocessor_config.json")),
    ),
    "transformers, a size in words": (
        "transformers:bad",
        ["bad"],
        copied(
            "resnet",
            "bad",
            write(
                "bad/preprocessor_config.json",
                {"image_processor_type": "ViTImageProcessor", "size": {"height": "large", "width": "large"}},
            ),
        ),
    ),
    "transformers, a mean of two numbers": (
        "transformers:bad",
        ["mean", "3 numbers"],
        copied(
            "resnet",
            "bad",
            write(
                "bad/preprocessor_config.json",
                {
                    "image_processor_type": "ViTImageProcessor",
                    "size": {"height": 24, "width": 24},
                    "image_mean": [0.5, 0.5],
                },
            ),
        ),
    ),
    "no network, no cache": ("resnet18.tv_in1k", ["HF_HUB_OFFLINE=1", "`hf download timm/resnet18.tv_in1k`"]),
    "the Hub, offline": ("hf-hub:org/net", ["HF_HUB_OFFLINE=1", "no files of org/net", "local-dir:PATH"]),
    "the Hub, a branch, offline": ("hf-hub:org/net@v2", ["HF_HUB_OFFLINE=1", "--revision v2"]),
    "the Hub, three names": ("hf-hub:org/net/x", ["neither a Hub id ORG/NAME"]),
    "the Hub, no name": ("'hf-hub:'", ["neither a Hub id ORG/NAME"]),
    "the Hub, a path for a branch": ("hf-hub:org/net@../../x", ["'../../x'", "not a branch, tag or commit"]),
    "transformers, offline": ("transformers:org/net", ["HF_HUB_OFFLINE=1", "`hf download org/net`"]),
    "squeezed, no architecture": ("squeeze:nonsense", ["nonsense", "no such architecture", "timm.list_models()"]),
    "squeezed, no BatchNorm": ("squeeze:test_nfnet", ["test_nfnet", "no BatchNorm layer"]),
}


def as_teacher(name):
    plain = shlex.split(name)[0]
    roles = {"teachers.logit": plain, "teachers.bn_pool": [], "relabel.teachers": [plain]}
    return " ".join(shlex.quote(f"{key}={json.dumps(value)}") for key, value in roles.items())


CASES |= {
    f"teacher: {name}": Bad(
        f"prism.py good.yaml {as_teacher(teacher)}", TeacherError, (shlex.split(teacher)[0][:30], *says), *make
    )
    for name, (teacher, says, *make) in TEACHERS.items()
}
CASES |= {
    "teacher: squeezed, no name": Bad(
        f"prism.py good.yaml {as_teacher(repr('squeeze:'))}", RecipeError, ("'squeeze:'", "squeeze:ARCHITECTURE")
    ),
    "teacher: a name of 300 letters": Bad(
        "prism.py bad.yaml",
        TeacherError,
        ("has no config.json", "expected a timm folder"),
        with_values({"teachers.logit": f"local-dir:{LONG}", "teachers.bn_pool": []}),
    ),
    "teacher: transformers, a name of 300 letters": Bad(
        "prism.py bad.yaml",
        TeacherError,
        ("neither a Hub id ORG/NAME",),
        with_values({"teachers.logit": f"transformers:{LONG}", "teachers.bn_pool": []}),
    ),
    "teacher: judges its own architecture": Bad(
        "prism.py good.yaml teachers.verifier=local-dir:net", RecipeError, ("held out", "name another architecture")
    ),
    "teacher: not trained yet": Bad(
        f"prism.py good.yaml {as_teacher('squeeze:test_byobnet')} --stage synthesize --teachers none",
        StageError,
        ("not trained yet in none", "prism-hf squeeze", "--teachers DIR"),
    ),
    "student: no architecture": Bad("prism.py good.yaml evaluation.student=nonsense", RecipeError, ("nonsense",)),
    "student: no model type": Bad(
        "prism.py good.yaml evaluation.student=transformers:nonsense", RecipeError, ("nonsense",)
    ),
}

# -- data -------------------------------------------------------------------------------------------------------------


def saved(name="bad", *, train=None, test=None, **columns):
    """Return a step that saves a DatasetDict with the given training split, or with other columns."""

    def make(here):
        part = train() if train is not None else rows(4, **columns)
        parts = {"train": part, "test": test() if test is not None else rows(2)}
        datasets.DatasetDict(parts).save_to_disk(here / name)

    return make


def tables(name="bad", **splits):
    """Return a step that writes Parquet files, which can be empty and can refer to images in other folders."""

    def make(here):
        (here / name / "data").mkdir(parents=True)
        for split, part in splits.items():
            pq.write_table(part().data.table, here / name / "data" / f"{split}-00000-of-00001.parquet")

    return make


def picture_folders(*homes):
    def make(here):
        for number, home in enumerate(homes):
            (here / "bad" / home).mkdir(parents=True)
            for i in range(4):
                random_picture(16, 16, seed=10 * number + i).save(here / "bad" / home / f"{i}.png")

    return make


FOLDERS = picture_folders(*(f"{split}/{name}" for split in ("train", "test") for name in NAMES))
WORDS = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
NUMBERS = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})


def unreadable(index, cell):
    """Return a function that makes the valid images with one cell replaced."""

    def part():
        table = rows(4).cast_column("image", datasets.Image(decode=False))
        cells = [cell if i == index else own for i, own in enumerate(table["image"])]
        return datasets.Dataset.from_dict({"image": cells, "label": table["label"]}, features=FEATURES)

    return part


DATA = {
    "no folder": ("./gone", ["./gone", "neither a folder here nor a Hub id"]),
    "no folder, no slash": ("gone", ["'gone'", "give `digits`, a Hub id or the path of a folder"]),
    "nobody's home": ("~nobody-there/x", ["~nobody-there/x", "path of a folder"]),
    "a name of two lines": ('"a\\nb"', ["'a\\nb'", "neither a folder here nor a Hub id"]),
    "a file": ("./good.yaml", ["good.yaml", "path of a folder"]),
    "the Hub, offline": ("org/pictures", ["org/pictures", "cannot be loaded", "HF_HUB_OFFLINE is set; unset it"]),
    "the Hub, no id": ("org/pic..tures", ["org/pic..tures"]),
    "an empty folder": ("bad", ["'bad'", "cannot be loaded"], folder("bad")),
    "a folder of text": (
        "bad",
        ["no column of type Image", "text (string)"],
        all_of(write("bad/train.txt", "no"), write("bad/test.txt", "no")),
    ),
    "no test split": ("bad", ["'bad'", "'test'"], picture_folders(*(f"train/{name}" for name in NAMES))),
    "a split of another name": ("bad", ["'train'"], tables(training=lambda: rows(4), test=lambda: rows(2))),
    "another config": ("pictures data.train_split=nope", ["no split 'nope'", "'train', 'test'"]),
    "a corrupt image": (
        "bad",
        ["row 5", "'train'", "remove or replace"],
        saved(train=unreadable(5, {"bytes": b"x", "path": None})),
    ),
    "an image of no bytes": ("bad", ["row 5", "'train'"], saved(train=unreadable(5, {"bytes": b"", "path": None}))),
    "an image that is missing": ("bad", ["row 5", "'train'"], saved(train=unreadable(5, None))),
    "an image that lies elsewhere": (
        "bad",
        ["row 5", "'train'"],
        tables(train=unreadable(5, {"bytes": None, "path": "/gone.png"}), test=lambda: rows(2)),
    ),
    "a corrupt file": ("bad", ["is not a readable image"], all_of(FOLDERS, write("bad/train/bee/1.png", b"no picture"))),
    "no image column": (
        "bad",
        ["no column of type Image", "data.image_column"],
        saved(train=lambda: rows(4).remove_columns("image")),
    ),
    "no label column": (
        "bad",
        ["no column of type ClassLabel", "data.label_column"],
        saved(train=lambda: rows(4).remove_columns("label")),
    ),
    "labels in words": (
        "bad data.label_column=label data.num_classes=4",
        ["'label'", "has 3 classes: 'ant', 'bee', 'cat'"],
        saved(train=lambda: rows(4, features=WORDS, label=[NAMES[i % 3] for i in range(12)])),
    ),
    "an image for a label": ("pictures data.label_column=image", ["'image'", "expected one class per image: ClassLabel"]),
    "a label for an image": ("pictures data.image_column=label", ["'label'", "expected Image"]),
    "a column that is not there": ("pictures data.label_column=class", ["'class'", "the columns are image (Image)"]),
    "another class count": ("pictures data.num_classes=4", ["data.num_classes is 4", "has 3 classes"]),
    "a label of -1": ("bad", ["row 2", "label -1", "expected 0 to 2"], saved(label=[0, 1, -1] * 4)),
    "a label too large": (
        "bad data.label_column=label",
        ["row 2", "label 3", "expected 0 to 2"],
        saved(train=lambda: rows(4, features=NUMBERS, label=[0, 1, 3] * 4)),
    ),
    "a label that is missing": ("bad", ["row 2", "'train'", "no label (null)"], saved(label=[0, 1, None] * 4)),
    "a test split without labels": (
        "bad",
        ["'test'", "label -1", "labeled split"],
        saved(test=lambda: rows(2, label=[-1] * 6)),
    ),
    "a test split of other classes": (
        "bad",
        ["'test'", "different order or number"],
        saved(test=lambda: rows(2).cast_column("label", datasets.ClassLabel(names=NAMES[::-1]))),
    ),
    "a test split without images": (
        "bad",
        ["'test'", "no column 'image'"],
        saved(test=lambda: rows(2).remove_columns("image")),
    ),
    "a test split of nothing": (
        "bad data.test_split=test[:0]",
        ["'test[:0]'", "no data"],
        tables(train=lambda: rows(4), test=lambda: rows(2)),
    ),
    "a training split of nothing": (
        "bad data.train_split=train[:0]",
        ["'train[:0]'", "no data"],
        tables(train=lambda: rows(4), test=lambda: rows(2)),
    ),
    "too few images": ("pictures synthesis.ipc=5", ["'ant' has 4 training images", "ipc is 5", "lower ipc"]),
    "fewer images than a squeeze batch": (
        "pictures squeeze.batch_size=13",
        ["squeeze.batch_size is 13", "12 training", "lower"],
    ),
    "too little to hold out": ("pictures data.validation_fraction=0.01", ["data.validation_fraction 0.01", "12 images"]),
    "too much held out": ("pictures data.validation_fraction=0.99", ["data.validation_fraction 0.99", "12 images"]),
    "saved without splits": (
        "bad",
        ["'bad'", "without splits", "DatasetDict"],
        lambda here: rows(4).save_to_disk(here / "bad"),
    ),
    "half a saved table": (
        "bad",
        ["'bad'", "cannot be loaded"],
        copied("pictures", "bad", cut("bad/train/data-00000-of-00001.arrow")),
    ),
    "a saved table without its file": (
        "bad",
        ["'bad'", "cannot be loaded"],
        copied("pictures", "bad", remove("bad/train/data-00000-of-00001.arrow")),
    ),
    "a saved set without its state": (
        "bad",
        ["'bad'", "cannot be loaded"],
        copied("pictures", "bad", remove("bad/train/state.json")),
    ),
    "a saved set with half a state": (
        "bad",
        ["'bad'", "cannot be loaded"],
        copied("pictures", "bad", cut("bad/train/state.json")),
    ),
    "a saved set with half its list": (
        "bad",
        ["'bad'", "cannot be loaded"],
        copied("pictures", "bad", cut("bad/dataset_dict.json")),
    ),
    "a saved set with another list": (
        "bad",
        ["'bad'", "cannot be loaded"],
        copied("pictures", "bad", write("bad/dataset_dict.json", [])),
    ),
    "half a Parquet file": (
        "bad",
        ["'bad'", "cannot be loaded"],
        all_of(tables(train=lambda: rows(4), test=lambda: rows(2)), cut("bad/data/train-00000-of-00001.parquet")),
    ),
    "a Parquet file of no bytes": (
        "bad",
        ["'bad'", "cannot be loaded"],
        all_of(tables(train=lambda: rows(4), test=lambda: rows(2)), write("bad/data/train-00000-of-00001.parquet", b"")),
    ),
    "a card that is no YAML": (
        "bad",
        ["bad/README.md", "no readable header"],
        all_of(tables(train=lambda: rows(4), test=lambda: rows(2)), write("bad/README.md", "---\nconfigs: [\n---\n")),
    ),
    "a config that is not there": (
        "bad data.config=large",
        ["'large'", "cannot be loaded"],
        tables(train=lambda: rows(4), test=lambda: rows(2)),
    ),
}
KINDS = {"fewer images than a squeeze batch": TeacherError}

CASES |= {
    f"data: {name}": Bad(
        f"prism.py good.yaml {shlex.quote('data.source=' + source.split(' ')[0])} " + " ".join(source.split(" ")[1:]),
        KINDS.get(name, DataError),
        tuple(says),
        *make,
    )
    for name, (source, says, *make) in DATA.items()
}

# -- folders ----------------------------------------------------------------------------------------------------------

ANOTHER = "belongs to another recipe"
CASES |= {
    "output: a file": Bad("prism.py good.yaml --output good.yaml", OutputError, ("'good.yaml' is a file", "--output")),
    "output: other things": Bad(
        "prism.py good.yaml --output pictures", OutputError, ("'pictures' is not empty", "--output DIR")
    ),
    "output: the folder itself": Bad("prism.py good.yaml --output ''", OutputError, ("is not empty", "--output DIR")),
    "output: below a file": Bad(
        "prism.py good.yaml --output good.yaml/out", OutputError, ("good.yaml/out", "is a file, or inside one", "--output")
    ),
    "output: of another recipe": Bad(
        "prism.py good.yaml synthesis.lr=0.5 --output out",
        OutputError,
        (ANOTHER, "synthesis.lr", "--output DIR"),
        write("out/recipe.yaml", TEXT),
    ),
    "output: of an unreadable recipe": Bad(
        "prism.py good.yaml --output out", OutputError, ("cannot be read", "--output"), write("out/recipe.yaml", "[")
    ),
    "output: of a recipe of another version": Bad(
        "prism.py good.yaml --output out",
        OutputError,
        ("unknown key 'later'", "--output"),
        write("out/recipe.yaml", TEXT + "later: {}\n"),
    ),
    "output: a folder for a recipe": Bad(
        "prism.py good.yaml --output out", OutputError, ("out", "--output"), folder("out/recipe.yaml")
    ),
    "output: a name of 300 letters": Bad(
        f"prism.py good.yaml --output {LONG}",
        OutputError,
        ("xxx", "--output"),
    ),
    "output: where nobody can write": Bad(
        "prism.py good.yaml --output /proc/prism", OutputError, ("/proc/prism", "--output DIR")
    ),
    "output: a file, squeeze": Bad(
        "squeeze.py good.yaml --output good.yaml",
        OutputError,
        ("good.yaml", "--teachers"),
    ),
    "teachers: a file": Bad(
        "prism.py good.yaml --output out --teachers good.yaml",
        OutputError,
        ("good.yaml", "--teachers"),
    ),
    "stage: nothing to package": Bad(
        "prism.py good.yaml --output out --stage package",
        StageError,
        ("run --stage",),
    ),
    "tracker: unknown": Bad("prism.py good.yaml --log-with nonsense", RecipeError, ("'nonsense'", "tensorboard")),
    "tracker: not installed": Bad("prism.py good.yaml --log-with trackio", RecipeError, ("trackio", "pip install trackio")),
}

# -- evaluate ---------------------------------------------------------------------------------------------------------

IMAGES, VIEWS = "set/data/train-00000-of-00001.parquet", "set/views/train-00000-of-00001.parquet"


def table(name, change):
    """Return a step that rewrites a table of the dataset."""
    return lambda here: pq.write_table(change(pq.read_table(here / name)), here / name)


def without_picture(found):
    cells = found["image"].to_pylist()
    cells[3] = None
    return found.set_column(0, found.schema.field("image"), pa.array(cells, found.schema.field("image").type))


EVALUATE = {
    "no folder": (
        "./gone",
        DataError,
        ["'./gone'", "is neither a folder here nor a Hub id", "give a folder with data/ and views/"],
    ),
    "a name of 300 letters": (LONG, DataError, ["neither a folder here nor a Hub id"]),
    "the Hub, offline": ("org/set", HubError, ["org/set", "HF_HUB_OFFLINE"]),
    "no id": ("'no id'", DataError, ["distilled dataset 'no id' is neither a folder here nor a Hub id"]),
    "a file": ("./good.yaml", DataError, ["good.yaml", "give a folder"]),
    "two datasets": ("set pictures", RecipeError, ["one dataset", "got 2", "evaluation.key=value"]),
    "no dataset": ("evaluation.lr=1", RecipeError, ["one dataset", "got 0"]),
    "an empty folder": ("bad", DataError, ["'bad'", "give a folder"], folder("bad")),
    "real pictures": ("pictures", DataError, ["'pictures'"]),
    "no recipe": ("set", DataError, ["recipe.yaml", "names the test data"], remove("set/recipe.yaml")),
    "a broken recipe": ("set", RecipeError, ["set/recipe.yaml"], cut("set/recipe.yaml")),
    "half the images": ("set", DataError, ["'set'", "cannot be loaded"], cut(IMAGES)),
    "half the views": ("set", DataError, ["'set'", "cannot be loaded"], cut(VIEWS)),
    "no views": ("set", DataError, ["'set'", "'views'"], remove("set/views")),
    "views that are cut short": (
        "set",
        DataError,
        ["table 'views' has 26 rows for 9 images", "whole epochs"],
        table(VIEWS, lambda t: t.slice(1)),
    ),
    "no image at all": ("set", DataError, ["'set'"], table(IMAGES, lambda t: t.slice(0, 0))),
    "an image that is none": ("set", DataError, ["row 3", "no image"], table(IMAGES, without_picture)),
    "images without labels": ("set", DataError, ["label"], table(IMAGES, lambda t: t.drop(["label"]))),
    "provenance in half": ("set", DataError, ["provenance.json"], cut("set/provenance.json")),
    "provenance of another kind": ("set", DataError, ["provenance.json"], write("set/provenance.json", [])),
    "provenance of nameless teachers": (
        "set",
        DataError,
        ["provenance.json"],
        write("set/provenance.json", {"teachers": [{}]}),
    ),
    "an override of the images": ("set synthesis.lr=1", RecipeError, ["synthesis.lr=1", "only evaluation.*"]),
    "an override that is no number": ("set evaluation.lr=fast", RecipeError, ["evaluation.lr", '"fast"']),
    "more epochs than there are": ("set evaluation.epochs=9", RecipeError, ["evaluation.epochs is 9", "stores 3"]),
    "no seeds": ("set --seeds 0", RecipeError, ["--seeds is 0", "at least 1"]),
    "no such student": ("set --student nonsense", RecipeError, ["nonsense"]),
    "no such test data": ("set --test ./gone", DataError, ["./gone", "neither a folder here nor a Hub id"]),
    "no such test split": ("set --test pictures:nope", DataError, ["'nope'"]),
    "test data of other classes": ("set --test digits", DataError, ["class 'ant'", "10 classes of the test data 'digits'"]),
}

CASES |= {
    f"evaluate: {name}": Bad(f"evaluate.py {words}", error, tuple(says), *make)
    for name, (words, error, says, *make) in EVALUATE.items()
}
CASES["evaluate: an output that is a file"] = Bad(
    "evaluate.py set --output good.yaml evaluation.full_data_epochs=0",
    OutputError,
    ("good.yaml", "--output"),
)

# -- push, verify, export ---------------------------------------------------------------------------------------------

EXPORT = "--format imagefolder"
CASES |= {
    "verify: no folder": Bad("prism-hf verify ./gone", HubError, ("./gone", "folder", "Hub id")),
    "verify: no name": Bad("prism-hf verify ''", HubError, ("''", "folder", "Hub id")),
    "verify: a file": Bad("prism-hf verify ./good.yaml", HubError, ("./good.yaml", "folder", "Hub id")),
    "verify: a name of 300 letters": Bad(f"prism-hf verify {LONG}", HubError, ("folder", "Hub id")),
    "verify: the Hub, offline": Bad("prism-hf verify org/set", HubError, ("org/set", "HF_HUB_OFFLINE")),
    "export: no folder": Bad(f"prism-hf export ./gone out {EXPORT}", DataError, ("./gone", "give a folder")),
    "export: the Hub, offline": Bad(f"prism-hf export org/set out {EXPORT}", HubError, ("org/set", "HF_HUB_OFFLINE")),
    "export: a name of 300 letters": Bad(
        f"prism-hf export {LONG} out {EXPORT}", DataError, ("neither a folder here nor a Hub id",)
    ),
    "export: real pictures": Bad(f"prism-hf export pictures out {EXPORT}", DataError, ("'pictures'",)),
    "export: into a full folder": Bad(
        f"prism-hf export set pictures {EXPORT}", OutputError, ("pictures is not empty", "give a folder")
    ),
    "export: into a file": Bad(
        f"prism-hf export set good.yaml {EXPORT}", OutputError, ("good.yaml is not a folder", "give one")
    ),
    "export: below a file": Bad(
        f"prism-hf export set good.yaml/x {EXPORT}", OutputError, ("good.yaml/x", "cannot be written")
    ),
    "export: into itself": Bad(
        f"prism-hf export set set/out {EXPORT}", OutputError, ("inside the dataset", "outside of it")
    ),
    "export: to a name of 300 letters": Bad(f"prism-hf export set {LONG} {EXPORT}", OutputError, ("cannot be written",)),
    "export: half the images": Bad(
        f"prism-hf export set out {EXPORT}", DataError, ("'set'", "cannot be loaded"), cut(IMAGES)
    ),
    "export: a class without images": Bad(
        f"prism-hf export set out {EXPORT}",
        DataError,
        ("has no image of class 'ant'",),
        table(IMAGES, lambda t: t.slice(3)),
    ),
    "export: an image that is none": Bad(
        f"prism-hf export set out {EXPORT}",
        DataError,
        ("row 3 of 'set' has no readable image",),
        table(IMAGES, without_picture),
        draft=True,
    ),
    "export: a class twice": Bad(
        f"prism-hf export set out {EXPORT}",
        DataError,
        ("several images of class",),
        table(IMAGES, lambda t: t.set_column(2, t.schema.field("slot"), [np.zeros(9, np.int32)])),
    ),
    "push: offline": Bad("prism-hf push set org/set", HubError, ("HF_HUB_OFFLINE is set", "unset it")),
    "push: no name of a repo": Bad("prism-hf push set 'bad name'", HubError, ("'bad name'", "not a valid Hub repo name")),
    "push: two branches": Bad(
        "prism-hf push set org/set --revision v2 --create-pr", HubError, ("--create-pr or --revision, not both",)
    ),
    "push: no name of a branch": Bad(
        "prism-hf push set org/set --revision a..b", HubError, ("'a..b'", "not a valid branch name")
    ),
    "push: offline, at the end of a run": Bad(
        "prism.py good.yaml --push-to-hub org/set --output out", HubError, ("HF_HUB_OFFLINE is set", "unset it")
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_bad_input_gives_one_error_line_and_changes_nothing(here, capsys, kind):
    check(CASES[kind], here, capsys)


# -- errors from the Hub ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class There:
    """The test Hub, the working folder, and the monkeypatch of the test."""

    hub: HubServer
    here: Path
    patch: pytest.MonkeyPatch


@pytest.fixture
def there(connected, here, tmp_path, monkeypatch):
    """Return a Hub with a few repos, without waiting times and with separate caches; ann may write to org."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", connected.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    files = {path.name: path.read_bytes() for path in (here / "net").iterdir()}
    shipped = {path.relative_to(here / "set").as_posix(): path.read_bytes() for path in (here / "set").rglob("*.*")}
    connected.create("models", "org/net", files)
    connected.create("models", "other/gated", files, gated=True)
    connected.create("models", "other/private", files, private=True)
    connected.create("models", "org/pickled", {"config.json": files["config.json"], "pytorch_model.bin": b"x"})
    connected.create("models", "org/bare", {"README.md": b"# nothing yet\n"})
    connected.create("datasets", "org/set", shipped, private=True)
    connected.create("datasets", "org/half", {k: v for k, v in shipped.items() if not k.startswith("views/")})
    connected.create("datasets", "org/public", {})
    connected.create(
        "datasets", "org/full", {"data/train-00000.parquet": b"somebody's", "README.md": b"# mine\n"}, private=True
    )
    connected.create("datasets", "other/gated", shipped, gated=True)
    connected.add_user("bob", token="hf_read", role="read", orgs=("org",))
    return There(connected, here, monkeypatch)


PAGE = Status(200, b"<html>Please log in to this hotel</html>", html=True)
AS_TEACHER = "prism.py good.yaml teachers.bn_pool=[] relabel.teachers=[{0}] teachers.logit={0}"
AS_DATA = "prism.py good.yaml data.source={0}"


def lasting(kind, action):
    return lambda there: there.hub.fault(kind, action, times=None)


def token(value):
    return lambda there: there.patch.setenv("HF_TOKEN", value) if value else there.patch.delenv("HF_TOKEN")


def local(make):
    return lambda there: make(there.here)


def gone(there):
    """Set the endpoint to a port on which no server listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    there.patch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    there.patch.setattr(datasets.config, "HF_ENDPOINT", url)


HUB = {
    "teacher: nobody's": (
        AS_TEACHER.format("hf-hub:org/none"),
        TeacherError,
        ["model org/none is not on the Hub", "HF_TOKEN", "hf auth login"],
    ),
    "teacher: private": (AS_TEACHER.format("hf-hub:other/private"), TeacherError, ["or it is private", "hf auth login"]),
    "teacher: gated": (
        AS_TEACHER.format("hf-hub:other/gated"),
        TeacherError,
        ["gated", "request access at", "/other/gated"],
    ),
    "teacher: no such branch": (
        AS_TEACHER.format("hf-hub:org/net@v9"),
        TeacherError,
        ["at 'v9'", "no such revision", "branches, tags or commits"],
    ),
    "teacher: 401": (AS_TEACHER.format("hf-hub:org/net"), TeacherError, ["401", "HF_TOKEN"], token("hf_unknown")),
    "teacher: 403": (
        AS_TEACHER.format("hf-hub:org/net"),
        TeacherError,
        ["'org/net'", "permission to do this (403"],
        lasting("repo_info", Status(403)),
    ),
    "teacher: 503": (
        AS_TEACHER.format("hf-hub:org/net"),
        TeacherError,
        ["answers 503", "`hf download org/net`"],
        lasting("repo_info", Status(503)),
    ),
    "teacher: a page of a hotel": (
        AS_TEACHER.format("hf-hub:org/net"),
        TeacherError,
        ["does not answer like a Hub", "HF_ENDPOINT"],
        lasting("repo_info", PAGE),
    ),
    "teacher: JSON of something else": (
        AS_TEACHER.format("hf-hub:org/net"),
        TeacherError,
        ["HF_ENDPOINT"],
        lasting("repo_info", Status(200, b'{"status": "ok"}')),
    ),
    "teacher: a list": (
        AS_TEACHER.format("hf-hub:org/net"),
        TeacherError,
        ["HF_ENDPOINT"],
        lasting("repo_info", Status(200, b"[]")),
    ),
    "teacher: no answer": (
        AS_TEACHER.format("hf-hub:org/net"),
        TeacherError,
        ["not reachable", "`hf download org/net`"],
        gone,
    ),
    "teacher: pickled weights": (
        AS_TEACHER.format("hf-hub:org/pickled"),
        TeacherError,
        ["pytorch_model.bin", "a pickle can run any code"],
    ),
    "teacher: an empty repo": (AS_TEACHER.format("hf-hub:org/bare"), TeacherError, ["org/bare", "has no config.json"]),
    "teacher: transformers, no weights": (
        AS_TEACHER.format("transformers:org/bare"),
        TeacherError,
        ["org/bare", "has no config.json"],
    ),
    "teacher: weights cut off": (
        AS_TEACHER.format("hf-hub:org/net"),
        TeacherError,
        ["org/net"],
        lasting("cdn_get", CutBody(100)),
    ),
    "teacher: weights that are not there": (
        AS_TEACHER.format("hf-hub:org/net"),
        TeacherError,
        ["org/net"],
        lasting("cdn_get", Status(404)),
    ),
    "data: nobody's": (AS_DATA.format("org/none"), DataError, ["org/none", "cannot be loaded"]),
    "data: gated": (AS_DATA.format("other/gated"), DataError, ["other/gated", "gated"]),
    "data: 503": (
        AS_DATA.format("org/set"),
        DataError,
        ["org/set", "cannot be loaded", "503"],
        lasting("repo_info", Status(503)),
    ),
    "data: a page of a hotel": (
        AS_DATA.format("org/set"),
        DataError,
        ["org/set", "cannot be loaded"],
        lasting("repo_info", PAGE),
    ),
    "data: no answer": (AS_DATA.format("org/set"), DataError, ["org/set", "cannot be loaded"], gone),
    "data: no such branch": (AS_DATA.format("org/set data.revision=v9"), DataError, ["org/set", "v9"]),
    "evaluate: nobody's": ("evaluate.py org/none", HubError, ["org/none", "404"]),
    "evaluate: no such branch": ("evaluate.py org/set --revision v9", HubError, ["org/set", "404"]),
    "evaluate: 503": (
        "evaluate.py org/set",
        HubError,
        ["asking the Hub for 'org/set'", "5 times"],
        lasting("repo_info", Status(503)),
    ),
    "evaluate: 403": ("evaluate.py org/set", HubError, ["permission to do this"], lasting("repo_info", Status(403))),
    "evaluate: a page of a hotel": (
        "evaluate.py org/set",
        HubError,
        ["asking the Hub for 'org/set'", "HF_ENDPOINT"],
        lasting("repo_info", PAGE),
    ),
    "evaluate: no answer": (
        "evaluate.py org/set",
        HubError,
        ["asking the Hub for 'org/set'", "run the same command again"],
        gone,
    ),
    "evaluate: no views": ("evaluate.py org/half", DataError, ["org/half", "'views'"]),
    "export: nobody's": (f"prism-hf export org/none out {EXPORT}", HubError, ["org/none", "404"]),
    "verify: nobody's": ("prism-hf verify org/none", HubError, ["org/none", "is not on the Hub", "404"]),
    "verify: no such branch": ("prism-hf verify org/set --revision v9", HubError, ["org/set", "404"]),
    "verify: 503": ("prism-hf verify org/set", HubError, ["5 times", "again later"], lasting("repo_info", Status(503))),
    "verify: a page of a hotel": (
        "prism-hf verify org/set",
        HubError,
        ["org/set", "HF_ENDPOINT"],
        lasting("repo_info", PAGE),
    ),
    "push: no token": ("prism-hf push set org/set", HubError, ["no Hugging Face token", "hf auth login"], token(None)),
    "push: an unknown token": (
        "prism-hf push set org/set",
        HubError,
        ["does not accept the token", "401"],
        token("hf_unknown"),
    ),
    "push: a token that only reads": (
        "prism-hf push set org/set",
        HubError,
        ["can only read", "settings/tokens"],
        token("hf_read"),
    ),
    "push: of somebody else's": ("prism-hf push set other/x", HubError, ["other", "neither you nor your organization"]),
    "push: into a public repo": ("prism-hf push set org/public", HubError, ["is public", "--public"]),
    "push: over something else": ("prism-hf push set org/full", HubError, ["org/full", "--replace"]),
    "push: no folder": ("prism-hf push ./gone org/new", HubError, ["'gone'", "nothing to push", "expected a dataset"]),
    "push: a name of 300 letters": (f"prism-hf push {LONG} org/new", HubError, ["File name too long"]),
    "push: a file": ("prism-hf push good.yaml org/new", HubError, ["good.yaml", "nothing to push"]),
    "push: a teacher without facts": ("prism-hf push net org/new", HubError, ["'net'", "nothing to push", "squeeze.json"]),
    "push: a damaged set": (
        "prism-hf push bad org/new",
        HubError,
        ["'bad'", "is not what was packaged", "--stage package"],
        local(copied("set", "bad", cut("bad/data/train-00000-of-00001.parquet"))),
    ),
    "push: half a provenance": (
        "prism-hf push bad org/new",
        HubError,
        ["'bad'", "provenance.json"],
        local(copied("set", "bad", cut("bad/provenance.json"))),
    ),
    "push: a set without card": (
        "prism-hf push bad org/new",
        HubError,
        ["'bad'", "README.md"],
        local(copied("set", "bad", remove("bad/README.md"))),
    ),
    "push: a run": (
        "prism-hf push run org/new",
        HubError,
        ["is a run folder", "run/dataset"],
        local(copied("set", "run/dataset")),
    ),
    "push: a page of a hotel": (
        "prism-hf push set org/new",
        HubError,
        ["whose token this is", "HF_ENDPOINT"],
        lasting("whoami", PAGE),
    ),
    "push: no answer": ("prism-hf push set org/new", HubError, ["whose token this is", "again later"], gone),
    "push: 403": ("prism-hf push set org/new", HubError, ["403"], lasting("create_repo", Status(403))),
    "push: before the work": (
        "prism.py good.yaml --push-to-hub other/x --output out",
        HubError,
        ["neither you nor your organization"],
    ),
}


WRITES = {"create_repo", "commit", "preupload", "create_branch", "upload"}


@pytest.mark.parametrize("transport", ["lfs"], indirect=True)
@pytest.mark.parametrize("kind", list(HUB))
def test_a_hub_error_gives_one_error_line_and_changes_nothing(there, here, capsys, kind):
    words, error, says, *make = HUB[kind]
    for step in make:
        step(there)
    check(Bad(words, error, tuple(says)), here, capsys)
    answered = {request.kind for request in there.hub.requests if request.status and request.status < 400}
    assert not answered & WRITES
