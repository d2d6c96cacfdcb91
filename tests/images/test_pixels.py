import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from prism_hf.errors import DataError
from prism_hf.images.pixels import (
    REFERENCE,
    clamp_,
    decode,
    encode,
    from_pil,
    noise,
    reference_mean_std,
    to_reference,
    to_uint8,
)  # fmt: skip


def every_value(channels):
    ramp = torch.arange(256, dtype=torch.uint8).view(16, 16)
    return torch.stack([ramp, ramp.flip(0), ramp.T][:channels])


def picture(mode, size=(40, 20)):
    rows = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(rows, "RGBA").convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_256_values_survive_the_reference_normalization(channels):
    images = every_value(channels)[None]
    assert torch.equal(to_uint8(to_reference(images)), images)
    assert torch.equal(to_uint8(to_reference(images).double()), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_reference_normalization_is_the_documented_one(channels):
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in REFERENCE[channels])
    images = every_value(channels)[None]
    torch.testing.assert_close(to_reference(images), (images / 255.0 - mean) / std)
    like = torch.zeros(1, dtype=torch.float64)
    assert all(t.dtype == torch.float64 for t in reference_mean_std(channels, like=like))


def test_to_uint8_rounds_and_clamps_where_the_published_code_truncates():
    mean, std = reference_mean_std(1)
    values = torch.tensor([-3.0, 0.4, 0.6, 254.6, 260.0]).view(1, 1, 1, 5)
    assert to_uint8((values / 255 - mean) / std).flatten().tolist() == [0, 0, 1, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_clamp_keeps_the_range_of_valid_pixels(channels):
    images = torch.randn(2, channels, 9, 9) * 5
    before = images.clone()
    result = clamp_(images)
    mean, std = reference_mean_std(channels)
    pixels = result * std + mean
    assert result is images
    assert float(pixels.min()) >= -1e-6
    assert float(pixels.max()) <= 1 + 1e-6
    inside = (before * std + mean > 0) & (before * std + mean < 1)
    assert torch.equal(result[inside], before[inside])


def test_noise_is_standard_normal_and_seeded():
    a, b = (noise((4, 3, 32, 32), torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(a, noise((4, 3, 32, 32), torch.Generator().manual_seed(0)))
    assert not torch.equal(a, b)
    assert abs(float(a.mean())) < 0.03
    assert abs(float(a.std()) - 1) < 0.03


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_lossless_formats_keep_every_byte(image_format, channels):
    for image in (every_value(channels), torch.randint(0, 256, (channels, 11, 7), dtype=torch.uint8)):
        data = encode(image, image_format)
        assert torch.equal(decode(data, channels), image)
        assert encode(image, image_format) == data


@pytest.mark.parametrize(("image_format", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_bytes_have_the_requested_format(image_format, kind):
    with Image.open(io.BytesIO(encode(every_value(3), image_format))) as opened:
        assert opened.format == kind


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_close_and_its_quality_matters(channels, tiny_images):
    image = tiny_images[0, :channels]
    high, low = encode(image, "jpeg", jpeg_quality=95), encode(image, "jpeg", jpeg_quality=20)
    error = (decode(high, channels).float() - image.float()).abs()
    assert float(error.mean()) < 2
    assert len(low) < len(high)


def test_gray_files_convert_to_rgb_and_back():
    gray = every_value(1)
    rgb = decode(encode(gray, "png"), 3)
    assert torch.equal(rgb, gray.expand(3, -1, -1))
    assert torch.equal(decode(encode(rgb, "png"), 1), gray)


PNG = encode(every_value(3), "png")
HUGE = b"IHDR" + b"\x00\x01\x00\x00" * 2 + PNG[24:29]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        PNG[:60],
        PNG[:-30],
        PNG[:8] + b"\x00" * 40,
        encode(every_value(3), "jpeg")[:100],
        encode(every_value(3), "webp")[:30],
        pytest.param(PNG[:11] + b"\x05" + PNG[12:]),
        pytest.param(PNG[:12] + HUGE + zlib.crc32(HUGE).to_bytes(4) + PNG[33:]),
    ],
    ids=["empty", "text", "cut", "cut end", "no header", "cut jpeg", "cut webp", "short header", "too large"],
)
def test_corrupt_bytes_raise_a_data_error(data):
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(data, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_is_converted_to_the_working_channels(mode, channels):
    image = from_pil(picture(mode), channels, size=16)
    assert image.shape == (channels, 16, 16)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (33, 32), (7, 50), (16, 16), (500, 3)])
def test_any_shape_is_cropped_to_the_center_square(size):
    assert from_pil(picture("RGB", size), 3, size=16).shape == (3, 16, 16)


def test_center_crop_is_the_center():
    array = np.zeros((10, 30, 3), dtype=np.uint8)
    array[:, 10:20] = 200
    assert bool((from_pil(Image.fromarray(array), 3, size=10) == 200).all())


def test_without_size_pixels_are_kept():
    source = picture("RGB")
    assert np.array_equal(from_pil(source, 3).numpy().transpose(1, 2, 0), np.asarray(source))
    square = picture("RGB", (16, 16))
    assert torch.equal(from_pil(square, 3, size=16), from_pil(square, 3))


def test_photos_are_rotated_upright(tmp_path):
    picture = Image.new("RGB", (8, 4))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    shown = from_pil(Image.open(tmp_path / "a.png"), 3)
    assert shown.shape == (3, 8, 4)
    assert shown[0, 0, 3] == 255
