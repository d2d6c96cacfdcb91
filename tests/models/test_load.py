import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from each import each
from foreign_teachers import resnet
from pipeline import one_line, save_timm
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, ResNetForImageClassification

from prism_hf.errors import TeacherError
from prism_hf.images.pixels import to_reference
from prism_hf.models.load import load_teacher, load_teachers
from prism_hf.models.teacher import classifier_of, digest_of_tensors, fit_teacher

CPU = torch.device("cpu")
NAMES = ("ant", "bee", "cat")
OWN = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 40, 40], "license": "mit"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_timm(tmp_path_factory.mktemp("teachers") / "timm", names=NAMES, **OWN)


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(f"local-dir:{folder}", device=CPU)


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    return resnet(tmp_path_factory.mktemp("teachers") / "resnet", names=NAMES)


def images(channels, size=16, count=4):
    shape = (count, channels, size, size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# -- facts of a loaded teacher ----------------------------------------------------------------------------------------


def test_a_local_timm_teacher_has_its_facts(teacher, folder):
    assert teacher.name == f"local-dir:{folder}"
    assert (teacher.mean, teacher.std, teacher.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 40)
    assert (teacher.num_classes, teacher.label_names) == (3, NAMES)
    assert (teacher.architecture, teacher.license, teacher.revision) == ("test_byobnet", "mit", None)
    assert re.fullmatch("[0-9a-f]{64}", teacher.weights_sha256)


def test_a_transformers_teacher_has_its_facts(resnet_folder):
    teacher = load_teacher(f"transformers:{resnet_folder}", device=CPU)
    assert (teacher.mean, teacher.std, teacher.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 24)
    assert (teacher.num_classes, teacher.label_names) == (3, NAMES)
    assert (teacher.architecture, teacher.license, teacher.revision) == ("resnet", "unknown", None)
    x = to_reference(images(3))
    expected = ResNetForImageClassification.from_pretrained(resnet_folder).eval()(pixel_values=teacher.prepare(x)).logits
    assert torch.equal(teacher.logits(x), expected)
    fit_teacher(teacher, class_names=NAMES, channels=3)


@pytest.mark.parametrize("size", [{"shortest_edge": 20}, {"height": 20, "width": 20}])
def test_a_transformers_processor_sets_the_input_size(tmp_path, size):
    teacher = load_teacher(f"transformers:{resnet(tmp_path, size=size)}", device=CPU)
    assert teacher.size == 20
    assert teacher.label_names is None, "LABEL_0, LABEL_1, ... are not names"


def test_every_teacher_is_frozen_and_in_eval_mode(teacher, resnet_folder):
    for one in (teacher, load_teacher(f"transformers:{resnet_folder}", device=CPU)):
        assert not any(module.training for module in one.model.modules())
        assert not any(parameter.requires_grad for parameter in one.model.parameters())
        before = digest_of_tensors(one.model.state_dict())
        x = to_reference(images(3)).requires_grad_()
        one.logits(x).sum().backward()
        assert x.grad.abs().sum() > 0
        assert digest_of_tensors(one.model.state_dict()) == before


def test_a_repeated_name_is_loaded_once(folder):
    name = f"local-dir:{folder}"
    loaded = load_teachers([name, "squeeze:x", name], device=CPU, squeezed={"squeeze:x": folder})
    assert list(loaded) == [name, "squeeze:x"]
    assert loaded["squeeze:x"].name == "squeeze:x"
    assert loaded["squeeze:x"].weights_sha256 == loaded[name].weights_sha256


@pytest.mark.parametrize("kind", ["local-dir", "transformers"])
def test_loading_does_not_change_the_global_random_state(folder, resnet_folder, kind):
    state = torch.get_rng_state()
    load_teacher(f"{kind}:{folder if kind == 'local-dir' else resnet_folder}", device=CPU)
    assert torch.equal(torch.get_rng_state(), state)


# -- prepare ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [40, 16, 64])
def test_prepare_equals_the_literal_conversion(teacher, channels, size):
    pixels = images(channels, size)
    literal = pixels.float() / 255
    literal = literal.expand(-1, 3, -1, -1)
    literal = (literal - torch.tensor(OWN["mean"]).view(1, 3, 1, 1)) / torch.tensor(OWN["std"]).view(1, 3, 1, 1)
    if size != 40:
        literal = F.interpolate(literal, (40, 40), mode="bilinear", antialias=True)
    prepared = teacher.prepare(to_reference(pixels))
    torch.testing.assert_close(prepared, literal, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.logits(to_reference(pixels)), teacher.model(literal), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_gray_image_is_the_sum_over_channels(teacher):
    gray = torch.zeros(1, 1, 40, 40, requires_grad=True)
    teacher.prepare(gray).sum().backward()
    expected = sum(0.226 / std for std in OWN["std"])
    torch.testing.assert_close(gray.grad, torch.full_like(gray, expected))


def test_prepare_does_not_modify_its_input(teacher):
    x = to_reference(images(3))
    copy = x.clone()
    teacher.prepare(x)
    assert torch.equal(x, copy)


# -- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_names", "words"),
    [
        (["ant", "dog"], ["class 'dog'", "3 classes"]),
        (["bee", "ant", "cats"], ["class 'cats'", "similar: 'cat'"]),
        (["ant", "bee", "cat", "dog"], ["class 'dog'", "3 classes"]),
        (["Ant", "ant"], ["one class 'ant' for 'Ant' and 'ant'"]),
    ],
)
def test_a_teacher_with_other_classes_gives_a_one_line_error(teacher, class_names, words):
    with pytest.raises(TeacherError) as error:
        fit_teacher(teacher, class_names=class_names, channels=3)
    text = one_line(error)
    assert all(word in text for word in [*words, teacher.name])


def test_other_spellings_of_the_labels_are_accepted(teacher):
    fit_teacher(teacher, class_names=["Ant", "Bee", "Cat"], channels=1)


def test_a_gray_teacher_rejects_rgb_data(tmp_path):
    model = timm.create_model("test_byobnet", num_classes=3, in_chans=1)
    gray = {"input_size": [1, 16, 16], "mean": [0.5], "std": [0.5], "num_classes": 3}
    config = {"num_classes": 3, "model_args": {"in_chans": 1}, "pretrained_cfg": {**model.pretrained_cfg, **gray}}
    timm.models.save_for_hf(model, str(tmp_path), model_config=config, safe_serialization=True)
    teacher = load_teacher(f"local-dir:{tmp_path}", device=CPU)
    assert teacher.logits(to_reference(images(1))).shape == (4, 3)
    fit_teacher(teacher, class_names=NAMES, channels=1)
    with pytest.raises(TeacherError) as error:
        fit_teacher(teacher, class_names=NAMES, channels=3)
    assert "1 channel" in one_line(error)


# -- teachers that cannot be loaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet1800.tv_in1k", ["no such architecture"]),
        ("nonsense", ["no such architecture"]),
        ("someone/something", ["hf-hub:ORG/NAME"]),
        ("timm:resnet18", ["hf-hub:ORG/NAME"]),
        ("local-dir:/no/such/folder", ["config.json", "model.safetensors"]),
        ("transformers:/no/such/folder", ["neither a Hub id", "nor, for transformers, a folder"]),
        ("squeeze:test_resnet", ["not trained yet"]),
        ("resnet18.tv_in1k", ["HF_HUB_OFFLINE=1", "hf download timm/resnet18.tv_in1k`"]),
        ("hf-hub:timm/resnet18.tv_in1k", ["HF_HUB_OFFLINE=1", "hf download timm/resnet18.tv_in1k`"]),
        ("hf_hub:timm/resnet18.tv_in1k@v2", ["HF_HUB_OFFLINE=1", "--revision v2`"]),
        ("transformers:microsoft/resnet-18", ["HF_HUB_OFFLINE=1", "hf download microsoft/resnet-18`"]),
        ("resnet18", ["HF_HUB_OFFLINE=1", "timm/resnet18.a1_in1k"]),
        ("resnet18.no_such_tag", ["no weights with that name", "resnet18.a1_in1k"]),
        ("gcvit_base.in1k", ["no weights with that name on the Hub"]),
        ("test_byobnet_", ["no such architecture", "test_byobnet"]),
    ],
)
def test_a_one_line_error_names_a_teacher_that_cannot_be_loaded(name, words):
    with pytest.raises(TeacherError) as error:
        load_teacher(name, device=CPU)
    text = one_line(error)
    assert all(word in text for word in [name, *words]), text


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["local-dir", "transformers"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path, folder, resnet_folder, kind):
    source, fired = (folder if kind == "local-dir" else resnet_folder), tmp_path / "fired"
    for path in source.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(fired)))
    with pytest.raises(TeacherError) as error:
        load_teacher(f"{kind}:{tmp_path}", device=CPU)
    assert "model.safetensors" in one_line(error) or "pytorch_model.bin" in one_line(error)
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    assert load_teacher(f"{kind}:{tmp_path}", device=CPU).num_classes == 3
    assert not fired.exists()


@pytest.mark.parametrize("damage", ["config", "no architecture", "list", "weights", "missing weight"])
def test_a_damaged_folder_gives_a_one_line_error(tmp_path, folder, damage):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if damage == "missing weight":
        weights = load_file(folder / "model.safetensors")
        weights.pop(next(key for key in weights if key.endswith("running_mean")))
        save_file(weights, tmp_path / "model.safetensors")
    else:
        name, data = {
            "config": ("config.json", b"{"),
            "no architecture": ("config.json", b"{}"),
            "list": ("config.json", b"[]"),
            "weights": ("model.safetensors", b"no weights"),
        }[damage]
        (tmp_path / name).write_bytes(data)
    with pytest.raises(TeacherError) as error:
        load_teacher(f"local-dir:{tmp_path}", device=CPU)
    assert str(tmp_path) in one_line(error)


def test_a_transformers_folder_without_processor_gives_a_one_line_error(tmp_path):
    resnet(tmp_path)
    for path in tmp_path.glob("*processor*.json"):
        path.unlink()
    with pytest.raises(TeacherError) as error:
        load_teacher(f"transformers:{tmp_path}", device=CPU)
    assert "save the image processor too: AutoImageProcessor" in one_line(error)


# -- class names ------------------------------------------------------------------------------------------------------


@each("labels, names, order", [
    (["a", "b", "c"], ["a", "b", "c"], None),
    (["A", "B", "C"], ["a", "b", "c"], None),
    (["B", "A", "C"], ["a", "b", "c"], [1, 0, 2]),
    (["hot_dog", "T-Rex", "caf\u00e9"], ["Hot Dog", "t rex", "cafe\u0301"], None),
    (["T-Rex", "hot_dog", "caf\u00e9"], ["Hot Dog", "t rex", "cafe\u0301"], [1, 0, 2]),
    (["A", "a", "B"], ["A", "a", "B"], None),
    (["a", "A", "B"], ["A", "a", "B"], [1, 0, 2]),
    (["aeroplane", "bird", "cat"], ["airplane", "bird", "cat"], None),
    (["bird", "aeroplane", "cat"], ["airplane", "bird", "cat"], "class 'airplane' is not one of the 3 classes"),
    (["crane", "crane", "dog"], ["crane", "crane", "dog"], None),
    (["dog", "crane", "crane"], ["crane", "crane", "dog"], "class 'crane' may be 'crane' (number 1) and 'crane' (2)"),
    (["x", "y", "z"], ["a", "b", "c"], None),
    (["tench, Tinca tinca", "goldfish", "y"], ["n01443537", "n01440764"], [1, 0]),
    (["n01443537", "n01440764", "n02012849"], ["crane (n02012849)", "tench"], [2, 1]),
    (["a", "b", "c"], ["c", "a"], [2, 0]),
])  # fmt: skip
def test_classes_are_matched_by_name_or_wordnet_id(teacher, labels, names, order):
    """Teachers list their classes in their own order, and may know more; `order` is that of the columns, `None` for all."""
    own = dataclasses.replace(teacher, label_names=tuple(labels))
    if isinstance(order, str):
        with pytest.raises(TeacherError) as error:
            fit_teacher(own, class_names=names, channels=3)
        assert order in one_line(error)
        return
    fitted, x = fit_teacher(own, class_names=names, channels=3), to_reference(images(3))
    assert (fitted is own) == (order is None)
    assert fitted.num_classes == len(names)
    assert torch.equal(fitted.logits(x), own.logits(x)[:, order or [0, 1, 2]])
    assert classifier_of(fitted.model) is classifier_of(own.model)


@each("labels, words", [
    ({0: "ant", 2: "cat", 3: "dog"}, "no class 1"),
    ({1: "ant", 2: "bee", 3: "cat"}, "no class 0"),
])  # fmt: skip
def test_class_names_with_gaps_are_refused(resnet_folder, folder, tmp_path, labels, words):
    net = Path(shutil.copytree(resnet_folder, tmp_path / "net"))
    content = json.loads((net / "config.json").read_text()) | {"id2label": labels}
    (net / "config.json").write_text(json.dumps(content))
    with pytest.raises(TeacherError) as error:
        load_teacher(f"transformers:{net}", device=CPU)
    assert "3 classes, but its config names 3" in one_line(error)
    assert words in one_line(error)
    (tmp_path / "timm").mkdir()
    with pytest.raises(TeacherError) as error:
        load_teacher(f"local-dir:{with_config(folder, tmp_path / 'timm', label_names=labels)}", device=CPU)
    assert words in one_line(error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_become_float32(resnet_folder, tmp_path, dtype):
    ResNetForImageClassification.from_pretrained(resnet_folder).to(dtype).save_pretrained(tmp_path)
    shutil.copy(resnet_folder / "preprocessor_config.json", tmp_path)
    teacher = load_teacher(f"transformers:{tmp_path}", device=CPU)
    assert {value.dtype for value in teacher.model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    x = to_reference(images(3))
    whole = load_teacher(f"transformers:{resnet_folder}", device=CPU).logits(x)
    torch.testing.assert_close(teacher.logits(x), whole, rtol=0.1, atol=0.02)


# -- hash of the weights ----------------------------------------------------------------------------------------------


def test_the_hash_of_weights_is_stable_and_sensitive(folder, teacher):
    again = load_teacher(f"local-dir:{folder}", device=CPU)
    assert again.weights_sha256 == teacher.weights_sha256
    model = again.model
    seen = {teacher.weights_sha256}
    with torch.no_grad():
        next(model.parameters())[0] += 1
        seen.add(digest_of_tensors(model.state_dict()))
        next(b for n, b in model.named_buffers() if n.endswith("running_var"))[-1] *= 2
        seen.add(digest_of_tensors(model.state_dict()))
    seen |= {digest_of_tensors(torch.nn.Linear(2, 3).state_dict()), digest_of_tensors(model.half().state_dict())}
    assert len(seen) == 5


def test_the_hash_of_weights_depends_on_names_and_shapes():
    flat, square = torch.nn.Module(), torch.nn.Module()
    flat.register_buffer("w", torch.zeros(4))
    square.register_buffer("w", torch.zeros(2, 2))
    other = torch.nn.Module()
    other.register_buffer("v", torch.zeros(4))
    assert len({digest_of_tensors(m.state_dict()) for m in (flat, square, other)}) == 3


def test_image_processor_and_prepare_agree_on_a_picture_of_the_right_size(resnet_folder):
    teacher, pixels = load_teacher(f"transformers:{resnet_folder}", device=CPU), images(3, 24)
    processor = AutoImageProcessor.from_pretrained(resnet_folder)
    expected = processor([p.permute(1, 2, 0).numpy() for p in pixels], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(teacher.prepare(to_reference(pixels)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"do_center_crop": True, "crop_size": {"height": 20, "width": 20}}, (20, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        ({"do_normalize": False}, (24, (0.0,) * 3, (1.0,) * 3)),
        ({"do_flip_channel_order": True}, (24, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),  # a ViT's processor does not know it
        ({"rescale_factor": 1 / 127.5}, (24, (0.05, 0.1, 0.15), (0.2, 0.25, 0.3))),
        (
            {"do_rescale": False, "image_mean": [102.0, 127.5, 51.0], "image_std": [51.0, 51.0, 25.5]},
            (24, (0.4, 0.5, 0.2), (0.2, 0.2, 0.1)),
        ),
        ({"size": {"height": 20, "width": 30}}, "expected one side of a square"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image processor"),
        ({"image_mean": [0.5, 0.5]}, "image processor"),
    ],
)
def test_each_step_of_an_image_processor_is_applied_or_refused(resnet_folder, tmp_path, changes, expected):
    folder = Path(shutil.copytree(resnet_folder, tmp_path / "net"))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if isinstance(expected, str):
        with pytest.raises(TeacherError, match=expected):
            load_teacher(f"transformers:{folder}", device=CPU)
    else:
        teacher = load_teacher(f"transformers:{folder}", device=CPU)
        assert (teacher.size, teacher.order) == (expected[0], None)
        assert (*teacher.mean, *teacher.std) == pytest.approx((*expected[1], *expected[2]), abs=1e-6)


# -- contents of configs ----------------------------------------------------------------------------------------------


def test_a_timm_folder_loads_as_the_same_teacher_with_transformers(folder, tmp_path, teacher):
    wrapped = load_teacher(f"transformers:{with_config(folder, tmp_path)}", device=CPU)
    for key in ("mean", "std", "size", "num_classes", "license", "architecture"):
        assert getattr(wrapped, key) == getattr(teacher, key), key
    x = to_reference(images(3))
    assert torch.equal(wrapped.logits(x), teacher.logits(x))


def with_config(folder, tmp_path, **facts):
    copy = Path(shutil.copytree(folder, tmp_path / "net"))
    content = json.loads((copy / "config.json").read_text())
    content["pretrained_cfg"] |= facts
    content.get("model_args", {}).pop("num_classes", None)  # transformers would pass these twice
    (copy / "config.json").write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize("kind", ["local-dir", "transformers"])
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"mean": [0.5, "0.5", 0.5]}, "mean"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean"),
        ({"std": [0.5, 0.5, -0.5]}, "std"),
        ({"input_size": [3, 32.5, 32]}, "input_size"),
        ({"input_size": [3, 0, 0]}, "input_size"),
    ],
)
def test_a_one_line_error_names_the_key_of_an_invalid_input(folder, tmp_path, kind, changes, key):
    copy = with_config(folder, tmp_path, **changes)
    with pytest.raises(TeacherError) as error:
        load_teacher(f"{kind}:{copy}", device=CPU)
    text = one_line(error)
    assert f"'{key}" in text or f"{key} is" in text or (kind == "transformers" and "cannot be loaded" in text), text


@pytest.mark.parametrize(("key", "value"), [("model_args", 3), ("model_args", ["x"]), ("pretrained_cfg", 3)])
def test_a_one_line_error_names_the_key_of_wrong_type_in_a_transformers_config(resnet_folder, tmp_path, key, value):
    copy = Path(shutil.copytree(resnet_folder, tmp_path / "net"))
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(TeacherError) as error:
        load_teacher(f"transformers:{copy}", device=CPU)
    text = one_line(error)
    assert key in text
    assert "config.json" in text


@pytest.mark.parametrize("kept", ["architecture", "flat"])
def test_older_timm_configs_may_be_flat(folder, tmp_path, teacher, kept):
    copy = Path(shutil.copytree(folder, tmp_path / "net"))
    content = json.loads((copy / "config.json").read_text())
    if kept == "flat":
        content = content["pretrained_cfg"] | {"architecture": content["architecture"], "mean": [0.1, 0.2]}
        (copy / "config.json").write_text(json.dumps(content))
        with pytest.raises(TeacherError, match="expected 3 numbers"):
            load_teacher(f"local-dir:{copy}", device=CPU)
        content["mean"] = [0.1, 0.2, 0.3]
    (copy / "config.json").write_text(json.dumps(content))
    assert load_teacher(f"local-dir:{copy}", device=CPU).mean == teacher.mean


def test_timm_may_list_labels_by_number(folder, tmp_path):
    copy = with_config(folder, tmp_path, label_names={"2": "cat", "1": "bee", "0": "ant"})
    assert load_teacher(f"local-dir:{copy}", device=CPU).label_names == NAMES
    shutil.rmtree(copy)
    copy = with_config(folder, tmp_path, label_names={"a": "ant", "b": "bee"})
    with pytest.raises(TeacherError) as error:
        load_teacher(f"local-dir:{copy}", device=CPU)
    assert "its class names have the keys ['a', 'b'], expected numbers" in one_line(error)
