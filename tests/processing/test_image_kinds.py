"""Real image files of every kind, compared with numpy or with the same image without the special feature."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, ImageOps, PngImagePlugin

from ssmvl.data.conversion.images import damage
from ssmvl.errors import DataError
from ssmvl.interfaces import ImageSpec
from ssmvl.processing import image_decoding
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt
from ssmvl.processing.tokenizers import byte_tokenizer
from ssmvl.processing.transforms import read_image, to_pixels

Pixels = NDArray[Any]
RNG = np.random.default_rng(0)
WHITE = 255


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    noise = RNG.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def values(*shape: int) -> Pixels:
    return RNG.integers(0, 256, shape, np.uint8)


def seen(image: Any) -> Pixels:
    read = read_image(image)
    assert read.mode == "RGB"
    return np.asarray(read).astype(int)


def oriented(orientation: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera of some make"
    exif[ExifTags.Base.Orientation] = orientation
    return exif


# The EXIF standard: where the first stored row and column appear.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda a: a.swapaxes(0, 1)[::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    image = Image.fromarray(values(6, 9, 3))
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    stored = np.asarray(Image.open(io.BytesIO(encoded(image, kind, **options))))
    raw = encoded(image, kind, exif=oriented(orientation), **options)
    assert np.array_equal(seen(raw), UPRIGHT[orientation](stored))
    assert np.array_equal(seen(Image.open(io.BytesIO(raw))), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("orientation", [0, 9, 1000])
def test_an_invalid_orientation_is_ignored(orientation: int) -> None:
    image = values(6, 9, 3)
    assert np.array_equal(seen(encoded(Image.fromarray(image), "PNG", exif=oriented(orientation))), image)


def test_an_image_with_damaged_exif_data_is_read() -> None:
    exif = oriented(6)
    exif[ExifTags.Base.XResolution] = 72.0
    image = Image.fromarray(values(6, 9, 3))
    whole, stored = encoded(image, "JPEG", exif=exif), seen(encoded(image, "JPEG"))
    start, end = whole.index(b"Exif\0\0") + 6, whole.index(b"Exif\0\0") + len(exif.tobytes())
    rejected, rng = 0, random.Random(0)
    for _ in range(400):
        raw = bytearray(whole)
        raw[rng.randrange(start, end)] = rng.randrange(256)
        assert any(np.array_equal(seen(bytes(raw)), turn(stored)) for turn in UPRIGHT.values())
        try:
            ImageOps.exif_transpose(Image.open(io.BytesIO(bytes(raw))))
        except Exception:
            rejected += 1
    assert rejected  # PIL's own function fails on these


def test_unreadable_exif_data_are_ignored() -> None:
    image, notes = values(6, 9, 3), PngImagePlugin.PngInfo()
    notes.add_text("Raw profile type exif", "\nexif\n 8\nno hexadecimal number\n")
    raw = encoded(Image.fromarray(image), "PNG", pnginfo=notes)
    with pytest.raises(ValueError, match="hexadecimal"):
        Image.open(io.BytesIO(raw)).getexif()
    assert np.array_equal(seen(raw), image)


def on_white(color: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None] / 255
    return color * share + WHITE * (1 - share)


ALPHA = values(6, 9) // 86 * 127  # 0, 127 and 254
ALPHA[0] = 255


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_rgb_with_alpha_is_composited_onto_white(kind: str) -> None:
    options = {"WEBP": {"lossless": True, "exact": True}}.get(kind, {})
    color = values(6, 9, 3)
    actual = seen(encoded(Image.fromarray(np.dstack([color, ALPHA])), kind, **options))
    assert np.abs(actual - on_white(color, ALPHA)).max() <= 1
    assert np.array_equal(actual[0], color[0])
    assert (actual[ALPHA == 0] == WHITE).all()


def test_gray_with_alpha_is_composited_onto_white() -> None:
    gray = values(6, 9)
    image = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(ALPHA)])
    assert np.abs(seen(encoded(image, "PNG")) - on_white(np.dstack([gray] * 3), ALPHA)).max() <= 1


def palette_image() -> tuple[Image.Image, Pixels, Pixels]:
    """An image, its indices and its palette."""
    indices, palette = values(6, 9) % 7, values(7, 3)
    image = Image.frombytes("P", (9, 6), indices.tobytes())
    image.putpalette(palette.tobytes())
    return image, indices, palette


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(kind: str) -> None:
    image, indices, palette = palette_image()
    assert np.array_equal(seen(encoded(image, kind)), palette[indices])


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_one_transparent_color(kind: str) -> None:
    image, indices, palette = palette_image()
    actual = seen(encoded(image, kind, transparency=3))
    assert np.array_equal(actual, np.where(indices[..., None] == 3, WHITE, palette[indices]))
    assert np.array_equal(seen(image), palette[indices])


def test_palette_with_an_alpha_for_each_color() -> None:
    image, indices, palette = palette_image()
    alpha = np.array([0, 255, 128, 7, 200, 255, 60], np.uint8)
    actual = seen(encoded(image, "PNG", transparency=alpha.tobytes()))
    assert np.abs(actual - on_white(palette[indices], alpha[indices])).max() <= 1


def test_a_transparent_color() -> None:
    gray, color = values(6, 9) % 5, values(6, 9, 3) % 2
    actual = seen(encoded(Image.fromarray(gray), "PNG", transparency=3))
    assert np.array_equal(actual, np.dstack([np.where(gray == 3, WHITE, gray)] * 3))
    actual = seen(encoded(Image.fromarray(color), "PNG", transparency=(1, 0, 1)))
    assert np.array_equal(actual, np.where((color == (1, 0, 1)).all(-1, keepdims=True), WHITE, color))
    deep = (values(6, 9) % 5).astype(np.uint16) * 5000
    actual = seen(encoded(Image.fromarray(deep), "PNG", transparency=15_000))
    assert np.array_equal(actual, np.dstack([np.where(deep == 15_000, WHITE, deep >> 8)] * 3))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF"])
def test_black_and_white(kind: str) -> None:
    bits = values(6, 9) > 127
    assert np.array_equal(seen(encoded(Image.fromarray(bits), kind)), np.dstack([bits * 255] * 3))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_the_upper_eight(kind: str) -> None:
    deep = RNG.integers(0, 65_536, (6, 9), np.uint16)
    assert np.array_equal(seen(encoded(Image.fromarray(deep), kind)), np.dstack([deep >> 8] * 3))


def test_sixteen_bits_in_other_modes() -> None:
    deep = RNG.integers(0, 65_536, (6, 9), np.uint16)
    big = Image.frombytes("I;16B", (9, 6), deep.astype(">u2").tobytes())
    for image in (big, encoded(big, "TIFF"), Image.fromarray(deep.astype(np.int32))):
        assert np.array_equal(seen(image), np.dstack([deep >> 8] * 3))


def test_floats_from_zero_to_one() -> None:
    floats = RNG.random((6, 9), np.float32)
    floats[0, 0], floats[0, 1] = 0, 1
    actual = seen(encoded(Image.fromarray(floats), "TIFF"))
    assert np.abs(actual - 255 * floats[..., None]).max() <= 0.5 + 1e-4
    assert actual[0, :2].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("wrong", [-0.1, 1.5, np.nan, np.inf, -1, 65_536])
def test_values_out_of_range_are_rejected(tmp_path: Path, wrong: float) -> None:
    pixels = np.full((2, 2), 0.5, np.float32) if isinstance(wrong, float) else np.full((2, 2), 5, np.int32)
    pixels[1, 1] = wrong
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: values from .*; scale them to 0 to (1|65535)$"):
        read_image(tmp_path / "a.tif")


def test_cmyk_jpeg() -> None:
    image = smooth(64, 48)
    inks = Image.merge("CMYK", [*ImageChops.invert(image).split(), Image.new("L", image.size, 0)])
    actual = seen(encoded(inks, "JPEG", quality=100, subsampling=0))
    assert np.abs(actual - np.asarray(image).astype(int)).max() <= 6


def test_ycck_jpeg() -> None:
    """PIL writes no YCCK, so write Adobe's planes as CMYK and change the marker to YCCK."""
    image = smooth(64, 48)
    stored = [*ImageChops.invert(image).convert("YCbCr").split(), Image.new("L", image.size, 255)]
    written = Image.merge("CMYK", [ImageChops.invert(plane) for plane in stored])  # PIL stores the inverse
    raw = bytearray(encoded(written, "JPEG", quality=100, subsampling=0))
    transform = raw.index(b"Adobe") + 11
    assert raw[transform] == 0
    raw[transform] = 2
    assert np.abs(seen(bytes(raw)) - np.asarray(image).astype(int)).max() <= 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_only_the_first_frame_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (9, 6), color) for color in ("#00ff00", "#ff0000", "#0000ff")]
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(raw)).n_frames == 3
    assert (seen(raw) == (0, 255, 0)).all()


def test_plain_images_equal_pillows_decoding_and_resizing() -> None:
    gray, color = smooth(150, 100).convert("L"), smooth(150, 100)
    for image in (gray, color):
        for raw in (encoded(image, "JPEG", quality=80), encoded(image, "PNG")):
            decoded = Image.open(io.BytesIO(raw)).convert("RGB")
            assert np.array_equal(seen(raw), np.asarray(decoded))
            expected = np.asarray(decoded.resize((40, 40), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
            assert torch.equal(to_pixels(read_image(raw), ImageSpec(40)), torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("size", [(2049, 1367), (4000, 3000)])
def test_pixels_of_a_large_jpeg_equal_those_of_the_papers_code(size: tuple[int, int]) -> None:
    raw = encoded(smooth(*size), "JPEG", quality=90)
    whole = Image.open(io.BytesIO(raw)).convert("RGB")
    processor = Processor(byte_tokenizer(), MambaPrompt(), (ImageSpec(84),), tokens_per_image=1)
    expected = np.asarray(whole.resize((84, 84), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert torch.equal(processor.pixels([raw])[ImageSpec(84)][0], torch.from_numpy(expected.copy()))


def gray(values: Any, dtype: Any, kind: str, **options: Any) -> bytes:
    return encoded(Image.fromarray(np.asarray(values, dtype)), kind, **options)


def test_32_bit_integers_of_at_most_255_are_8_bits() -> None:
    ramp = np.arange(256).reshape(16, 16)
    assert (seen(gray(ramp, np.int32, "TIFF"))[..., 1] == ramp).all()
    assert (seen(Image.fromarray(ramp.astype(np.int32)))[..., 1] == ramp).all()
    assert (seen(gray(ramp * 257, np.int32, "TIFF"))[..., 1] == ramp).all()
    assert (seen(b"P5 16 16 65535\n" + (ramp * 257).astype(">u2").tobytes())[..., 1] == ramp).all()


@pytest.mark.parametrize(
    "raw",
    [
        gray(np.arange(4096).reshape(64, 64), np.uint16, "PNG"),
        gray(np.arange(4096).reshape(64, 64), np.uint16, "TIFF"),
        gray(np.arange(4096).reshape(64, 64), np.int32, "TIFF"),
        b"P5 4 1 65535\n" + bytes([0, 1, 0, 2, 0, 3, 0, 255]),
    ],
)
def test_images_that_would_be_almost_black_are_rejected(raw: bytes) -> None:
    with pytest.raises(DataError, match=r"would be almost black, because white is 65535; scale them"):
        read_image(raw)
    assert "almost black" in damage(raw)


def test_black_stays_black_and_zero_is_white_in_a_white_is_zero_tiff() -> None:
    assert (seen(gray(np.zeros((2, 2)), np.uint16, "PNG")) == 0).all()
    ramp = np.arange(256).reshape(16, 16)
    inverted = gray(ramp * 257, np.uint16, "TIFF", tiffinfo={262: 0})
    assert (seen(inverted)[..., 0] == 255 - ramp).all()
    assert (seen(gray(ramp / 255, np.float32, "TIFF", tiffinfo={262: 0}))[..., 0] == 255 - ramp).all()
    assert seen(gray(np.arange(3000).reshape(30, 100), np.uint16, "TIFF", tiffinfo={262: 0})).min() > 240
    with pytest.raises(DataError, match="almost black"):
        read_image(gray(65_535 - np.arange(3000).reshape(30, 100), np.uint16, "TIFF", tiffinfo={262: 0}))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, color: int, row: bytes, *more: bytes, size: int = 16) -> bytes:
    """A PNG assembled from its bit depth, color type, one row for all rows, and chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, depth, color, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * size))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("color", [2, 4, 6])
def test_16_bit_color_that_would_be_almost_black_is_rejected(color: int) -> None:
    channels = {2: [4095] * 3, 4: [4095, 65_535], 6: [4095] * 3 + [65_535]}[color]
    with pytest.raises(DataError, match="would be almost black; scale them"):
        read_image(png(16, color, struct.pack(f">{len(channels)}H", *channels) * 16))
    bright = [40_000] * len(channels)
    assert seen(png(16, color, struct.pack(f">{len(channels)}H", *bright) * 16)).min() > 100


@pytest.mark.parametrize(
    ("depth", "color", "row", "value"),
    [
        (4, 0, b"\x77" * 8, b"\0\7"),
        (2, 0, b"\x55" * 4, b"\0\1"),
        (16, 2, struct.pack(">3H", 40_000, 50_000, 60_000) * 16, struct.pack(">3H", 40_000, 50_000, 60_000)),
        (8, 2, b"\1\2\3" * 16, struct.pack(">3H", 1, 2, 3)),
    ],
)
def test_a_transparent_value_is_recognized_at_every_bit_depth(depth: int, color: int, row: bytes, value: bytes) -> None:
    assert (seen(png(depth, color, row, chunk(b"tRNS", value))) == WHITE).all()


def test_a_png_with_a_long_color_profile_is_read() -> None:
    profile = chunk(b"iCCP", b"icc\0\0" + zlib.compress(RNG.bytes(1_500_000)))
    assert (seen(png(8, 2, b"\xff\0\0" * 16, profile)) == (255, 0, 0)).all()


def test_signed_bytes_are_rejected() -> None:
    with pytest.raises(DataError, match="signed bytes are not supported"):
        read_image(gray(np.arange(16).reshape(4, 4), np.uint8, "TIFF", tiffinfo={339: 2}))


@pytest.mark.parametrize("values", [np.arange(256.0).reshape(16, 16), np.full((2, 2), -0.1), np.array([[0.5, np.nan]])])
def test_floats_out_of_range_are_rejected_before_conversion(values: Any) -> None:
    raw = gray(values, np.float32, "TIFF")
    with pytest.raises(DataError, match=r"scale them to 0 to 1$"):
        read_image(raw)
    assert "scale them to 0 to 1" in damage(raw)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["tEXt", "iTXt"])
@pytest.mark.parametrize("late", [False, True])
def test_a_png_with_long_texts_is_read(compressed: bool, kind: str, late: bool, tmp_path: Path) -> None:
    image, info = smooth(40, 30), PngImagePlugin.PngInfo()
    text = "a workflow " * 200_000
    (info.add_itxt if kind == "iTXt" else info.add_text)("workflow", text, zip=compressed)
    raw = encoded(image, "PNG", pnginfo=info)
    if late:  # after the pixels, where some tools append it
        plain = encoded(image, "PNG")
        raw = plain[:-12] + raw[33 : raw.index(b"IDAT") - 4] + plain[-12:]
    assert (seen(raw) == np.asarray(image)).all()
    (tmp_path / "a.png").write_bytes(raw)
    assert (seen(tmp_path / "a.png") == np.asarray(image)).all()
    assert damage(raw) == ""


def test_the_orientation_in_a_short_text_is_kept() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6" />', zip=True)
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    assert seen(encoded(smooth(40, 30), "PNG", pnginfo=info)).shape == (40, 30, 3)


def gif_bomb() -> bytes:
    """A GIF with a one-pixel screen and a far larger first frame."""
    screen, frame = struct.pack("<HHBBB", 1, 1, 0xF0, 0, 0), struct.pack("<HHHHB", 0, 0, 11_000, 11_000, 0)
    return b"GIF89a" + screen + bytes([0, 0, 0, 255, 255, 255]) + b"," + frame + b"\x02\x02\x44\x01\x00;"


def webp_bomb() -> bytes:
    """A WebP with two small frames on a large canvas."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    raw = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    canvas = raw.index(b"VP8X") + 12
    raw[canvas : canvas + 6] = 2 * (10_999).to_bytes(3, "little")
    return bytes(raw)


def tiff_bomb() -> bytes:
    raw = encoded(Image.new("L", (8, 8)), "TIFF", compression="tiff_deflate")
    for tag in (256, 257):  # width and height
        raw = raw.replace(struct.pack("<HHII", tag, 4, 1, 8), struct.pack("<HHII", tag, 4, 1, 11_000))
        raw = raw.replace(struct.pack("<HHIHH", tag, 3, 1, 8, 0), struct.pack("<HHIHH", tag, 3, 1, 11_000, 0))
    return raw


@pytest.mark.parametrize("bomb", [gif_bomb, webp_bomb, tiff_bomb])
def test_a_bomb_in_a_frame_is_rejected(bomb: Callable[[], bytes]) -> None:
    with pytest.raises(DataError, match="11000 x 11000 pixels; at most 100000000 are allowed"):
        read_image(bomb())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_bytes_are_an_image_or_a_data_error(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 10_000)
    exif = {"exif": oriented(6)} if kind in ("JPEG", "PNG", "WEBP") else {}
    whole, rng, rejected = encoded(smooth(48, 32), kind, **exif), random.Random(0), 0
    for _ in range(400):
        raw = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randrange(1, 4)):
            if raw:
                raw[rng.randrange(min(len(raw), 400))] = rng.randrange(256)
        try:
            assert seen(bytes(raw)).shape[2] == 3
        except DataError:
            rejected += 1
    assert rejected


def test_a_pil_image_whose_file_is_closed_is_a_data_error(tmp_path: Path) -> None:
    smooth(48, 32).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(DataError, match=r"cannot be decoded as an image \(\w+Error: "):
        read_image(image)


def test_formats_that_start_external_programs_are_not_opened(tmp_path: Path) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(DataError, match="cannot be decoded as an image"):
        read_image(eps)
    assert damage(eps).startswith("not a valid image (")
