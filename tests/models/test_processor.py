"""A teacher sees exactly the pixels that its own image processor makes."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import transformers
from conftest import make_teacher
from each import each
from PIL import Image
from pipeline import one_line
from sklearn.datasets import load_sample_image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from prism_hf.errors import TeacherError
from prism_hf.images import to_reference
from prism_hf.models.load import load_teacher
from prism_hf.models.processor import pixel_map

CPU = torch.device("cpu")
SIDE = 32
PHOTO = np.ascontiguousarray(load_sample_image("china.jpg")[150 : 150 + SIDE, 250 : 250 + SIDE])
PROCESSORS = sorted(
    {
        name
        for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        for name in (IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or {}).values()
    }
    - {"TimmWrapperImageProcessor"}  # needs a model; tests/models/test_load.py has one
)
NOT_LINEAR = {"ImageGPTImageProcessor", "ImageGPTImageProcessorPil", "Siglip2ImageProcessor", "Siglip2ImageProcessorPil"}


def shown_by(processor):
    """Return the processor's output for the photo, (1, 3, S, S), without resizing, crops and padding."""
    plain = copy.deepcopy(processor)
    for switch in ("do_resize", "do_center_crop", "do_pad", "do_thumbnail", "do_align_long_axis", "do_pan_and_scan"):
        if hasattr(plain, switch):
            setattr(plain, switch, False)
    return plain(Image.fromarray(PHOTO), return_tensors="pt")["pixel_values"]


def prepared_by(found):
    teacher = dataclasses.replace(
        make_teacher("test_byobnet", num_classes=3), mean=found.mean, std=found.std, order=found.order, size=SIDE
    )
    return teacher.prepare(to_reference(torch.from_numpy(PHOTO).permute(2, 0, 1)[None]))


def test_there_are_processors_to_try():
    assert len(PROCESSORS) > 40
    assert set(PROCESSORS) >= NOT_LINEAR


@each("name", PROCESSORS)
def test_every_processor_is_followed_exactly_or_refused(name):
    processor = getattr(transformers, name)()
    if name in NOT_LINEAR:
        with pytest.raises(TeacherError) as error:
            pixel_map(processor, 3, SIDE, "x")
        assert "image processor" in one_line(error)
        return
    expected = shown_by(processor)
    torch.testing.assert_close(prepared_by(pixel_map(processor, 3, SIDE, "x")), expected, rtol=1e-5, atol=2e-6 * 4)


CHANGES = [
    ("ViTImageProcessor", {"do_rescale": False, "image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]}),
    ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
    ("ViTImageProcessor", {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
    ("ViTImageProcessor", {"do_normalize": False}),
    ("EfficientNetImageProcessor", {"include_top": False}),
    ("EfficientNetImageProcessor", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
    ("EfficientNetImageProcessorPil", {"rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False}),
    ("MobileViTImageProcessor", {"do_flip_channel_order": False}),
    ("ConvNextImageProcessor", {"crop_pct": 0.5, "size": {"shortest_edge": SIDE}}),
    ("CLIPImageProcessor", {"do_rescale": False, "image_mean": [0.0] * 3, "image_std": [255.0] * 3}),
]


@each("name, changes", CHANGES)
def test_every_way_to_state_a_normalization_is_followed_exactly(name, changes):
    processor = getattr(transformers, name)(**changes)
    expected = shown_by(processor)
    found = prepared_by(pixel_map(processor, 3, SIDE, "x"))
    assert float((found - expected).abs().max()) < 2e-5 * max(1.0, float(expected.abs().max()))


def test_channels_in_another_order_are_reordered():
    found = pixel_map(transformers.MobileViTImageProcessor(), 3, SIDE, "x")
    assert found.order == (2, 1, 0)
    assert (*found.mean, *found.std) == pytest.approx((0, 0, 0, 1, 1, 1), abs=1e-6)


def test_a_gray_picture_is_the_same_in_any_order_of_channels():
    gray = torch.randint(0, 256, (1, 1, SIDE, SIDE), dtype=torch.uint8)
    teacher = make_teacher("test_byobnet", num_classes=3)
    swapped = dataclasses.replace(teacher, order=(2, 1, 0))
    assert torch.equal(swapped.prepare(to_reference(gray)), teacher.prepare(to_reference(gray)))


MODELS = {
    "resnet": (
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2),
        transformers.ViTImageProcessor(
            size={"height": SIDE, "width": SIDE},
            do_rescale=False, image_mean=[123.7, 116.3, 103.5], image_std=[58.4, 57.1, 57.4],
        ),
    ),
    "efficientnet": (
        transformers.EfficientNetConfig(
            width_coefficient=0.25, depth_coefficient=0.1, image_size=SIDE, hidden_dim=320, num_labels=2
        ),
        transformers.EfficientNetImageProcessor(size={"height": SIDE, "width": SIDE}),
    ),
    "mobilenet": (
        transformers.MobileNetV1Config(depth_multiplier=0.25, image_size=SIDE, num_labels=2),
        transformers.PPLCNetImageProcessor(
            size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_the_logits_of_a_teacher_are_those_of_processor_and_model(tmp_path, kind):
    config, processor = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    teacher = load_teacher(f"transformers:{tmp_path}", device=CPU)
    assert teacher.size == SIDE
    with torch.no_grad():
        expected = model(shown_by(transformers.AutoImageProcessor.from_pretrained(tmp_path))).logits
        found = teacher.logits(to_reference(torch.from_numpy(PHOTO).permute(2, 0, 1)[None]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("key", "value"), [("mean", [123.7, 116.3, 103.5]), ("std", [58.4, 57.1, 57.4])])
def test_a_timm_config_in_units_of_0_to_255_is_refused(tmp_path, key, value):
    from pipeline import save_timm

    save_timm(tmp_path, **{key: value})
    with pytest.raises(TeacherError) as error:
        load_teacher(f"local-dir:{tmp_path}", device=CPU)
    assert f"{key} is" in one_line(error)
    assert "divide it by 255" in one_line(error)
