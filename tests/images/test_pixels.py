import io
import struct
import zlib

import numpy as np
import pytest
import torch
from each import each, product
from PIL import Image, ImageColor

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


# -- transparency -----------------------------------------------------------------------------------------------------


def cutout(mode, hidden=(255, 0, 255)):
    """A picture whose left half is opaque (10, 20, 30), and whose right half is transparent and hides another color."""
    array = np.zeros((8, 8, 4), np.uint8)
    array[:, :4], array[:, 4:] = (10, 20, 30, 255), (*hidden, 0)
    picture = Image.fromarray(array, "RGBA")
    if mode == "P":
        picture = Image.fromarray(np.repeat([[0, 1]], 4, 1).repeat(8, 0).astype(np.uint8), "P")
        picture.putpalette([10, 20, 30, *hidden])
        picture.info["transparency"] = 1
    elif mode == "RGB":
        picture = picture.convert("RGB")
        picture.info["transparency"] = hidden
    elif mode != "RGBA":
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    options = {"transparency": picture.info["transparency"]} if "transparency" in picture.info else {}
    picture.save(buffer, "PNG", **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


@each("mode, background", product(["RGBA", "LA", "P", "RGB"], ["white", "black", "#306090"]))
def test_transparent_pixels_show_the_background(mode, background):
    opaque = np.array([18] * 3 if mode == "LA" else [10, 20, 30])
    shown = from_pil(cutout(mode), 3, background=background)
    expected = torch.tensor(ImageColor.getrgb(background), dtype=torch.uint8).view(3, 1, 1)
    assert bool((shown[:, :, 4:] == expected).all())
    assert np.array_equal(shown[:, 0, 0].numpy(), opaque)
    gray = from_pil(cutout(mode), 1, background=background)
    assert int(gray[0, 0, 7]) == ImageColor.getcolor(background, "L")


def test_a_half_transparent_pixel_is_a_mixture():
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 51))  # 20 % black on white
    assert from_pil(picture, 3).unique().tolist() == [204]


def test_an_opaque_picture_is_not_changed_by_its_alpha_channel():
    plain = picture("RGB", (9, 7))
    assert torch.equal(from_pil(plain.convert("RGBA"), 3), from_pil(plain, 3))


# -- more than eight bits ---------------------------------------------------------------------------------------------


def stored(array, kind="TIFF"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return Image.open(io.BytesIO(buffer.getvalue()))


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@each("array, white_level", [
    (RAMP.astype(np.float32), None), ((RAMP * 255).astype(np.float32), 255), ((RAMP * 4095).astype(np.uint16), 4095),
    ((RAMP * 65535).astype(np.uint16), None), ((RAMP * 65535).astype(np.uint16), 65535),
    ((RAMP * 100_000).astype(np.int32), 100_000), ((RAMP * 255).astype(np.int32), 255),
])  # fmt: skip
def test_deep_images_are_scaled_to_eight_bits(array, white_level):
    shown = from_pil(stored(array), 1, white_level=white_level)[0].numpy()
    high = white_level or (1.0 if array.dtype == np.float32 else 65535)
    assert np.array_equal(shown, (array.astype(np.float64) * 255 / high).round())
    assert shown.max() == 255
    assert np.array_equal(from_pil(stored(array), 3, white_level=white_level)[2].numpy(), shown)


@each("array, white_level, words", [
    ((RAMP * 255).astype(np.float32), None, ["floats from 0 to 255, expected 0 to 1", "data.white_level"]),
    ((RAMP - 0.5).astype(np.float32), None, ["from -0.5 to 0.5"]),
    (np.full((4, 4), np.nan, np.float32), None, ["nan"]),
    (np.full((4, 4), np.inf, np.float32), 1.0, ["inf"]),
    ((RAMP * 1000).astype(np.int32), None, ["32-bit integers from 0 to 1000, expected a data.white_level"]),
    ((RAMP * 5000).astype(np.uint16), 4095, ["16-bit integers from 0 to 5000, expected 0 to 4095"]),
    ((RAMP * 4095).astype(np.uint16), None, ["fits into 12 bits", "white_level"]),
    ((RAMP * 255).astype(np.uint16), None, ["fits into 8 bits"]),
    ((RAMP * 1023).astype(np.uint16), None, ["fits into 10 bits"]),
    ((RAMP * 16383).astype(np.uint16), None, ["fits into 14 bits"]),
])  # fmt: skip
def test_values_that_do_not_match_the_white_level_are_refused(array, white_level, words):
    with pytest.raises(DataError) as error:
        from_pil(stored(array), 1, white_level=white_level)
    assert all(word in str(error.value) for word in words), str(error.value)


def deep_png(array):
    """Return a color PNG with 16 bits per channel, which Pillow cannot write."""
    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return Image.open(io.BytesIO(whole))


def test_a_color_image_with_sixteen_bits_is_read_or_refused():
    color = np.repeat(RAMP[..., None], 3, 2)
    full = from_pil(deep_png((color * 65535).astype(np.uint16)), 3)
    assert np.array_equal(full.numpy()[0], (RAMP * 65535).astype(np.uint16) >> 8)
    with pytest.raises(DataError, match="fits into 12 bits"):
        from_pil(deep_png((color * 4095).astype(np.uint16)), 3)
    with pytest.raises(DataError, match=r"16 bits per color, and data.white_level is 4095"):
        from_pil(deep_png((color * 4095).astype(np.uint16)), 3, white_level=4095)
    dark = from_pil(deep_png((color * 4095).astype(np.uint16)), 3, white_level=65535)
    assert int(dark.max()) == 15


def test_a_black_image_with_sixteen_bits_is_black():
    assert int(from_pil(stored(np.zeros((4, 4), np.uint16)), 1).max()) == 0
