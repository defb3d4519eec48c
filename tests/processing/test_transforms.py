"""Images of every kind become uint8 pixels, or a readable error."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize, functional

from ssmvl.errors import DataError
from ssmvl.interfaces import ImageSpec
from ssmvl.interfaces import Resize as Way
from ssmvl.processing import image_decoding
from ssmvl.processing.transforms import read_image, to_pixels

GREEN, RED, BLUE = (0, 255, 0), (255, 0, 0), (0, 0, 255)
WAYS: tuple[Way, ...] = ("resize-naive", "resize-crop", "letterbox")
sides = st.integers(1, 60) | st.just(1000)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def green(mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (8, 6), GREEN).convert(mode)


def noise() -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "PNG")


ENCODINGS: dict[str, Callable[[], bytes]] = {
    "png": lambda: encoded(green(), "PNG"),
    "jpeg": lambda: encoded(green(), "JPEG", quality=95),
    "gif": lambda: encoded(green("P"), "GIF"),
    "palette": lambda: encoded(green("P"), "PNG"),
    "rgba": lambda: encoded(green("RGBA"), "PNG"),
    "cmyk": lambda: encoded(green("CMYK"), "JPEG", quality=95),
    "webp": lambda: encoded(green(), "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", ENCODINGS)
def test_bytes_of_many_kinds(kind: str) -> None:
    image = read_image(ENCODINGS[kind]())
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert np.abs(np.asarray(image).astype(int) - GREEN).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_brightness(kind: str) -> None:
    image = read_image(encoded(Image.fromarray(np.full((6, 8), 32_768, np.uint16)), kind))
    assert np.abs(np.asarray(image).astype(int) - 128).max() <= 1


def test_grey_and_black_and_white() -> None:
    assert read_image(encoded(Image.new("L", (2, 2), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
    assert read_image(encoded(Image.new("1", (2, 2), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_transparency_in_bytes_is_read_without_a_warning() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, *GREEN])
    assert read_image(encoded(image, "PNG", transparency=bytes([0, 255]))).getpixel((0, 0)) == GREEN


@pytest.mark.parametrize("kind", [str, Path])
def test_reads_a_path(tmp_path: Path, kind: type) -> None:
    (tmp_path / "a.png").write_bytes(ENCODINGS["png"]())
    assert read_image(kind(tmp_path / "a.png")).getpixel((0, 0)) == GREEN


def test_an_animation_is_its_first_frame_and_its_file_is_closed(tmp_path: Path) -> None:
    green().save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (8, 6), "red")])
    assert read_image(tmp_path / "a.gif").getpixel((0, 0)) == GREEN


def test_takes_a_pil_image() -> None:
    assert read_image(green("RGBA")).mode == "RGB"


@pytest.mark.parametrize("size", [1, 5, 48])
def test_pixels_are_uint8_planes_of_the_side_asked_for(size: int) -> None:
    pixels = to_pixels(green(), ImageSpec(size))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, size, size)
    assert pixels.is_contiguous()
    assert (pixels == torch.tensor(GREEN).view(3, 1, 1)).all()


def test_pixels_of_an_image_of_that_size_are_its_own() -> None:
    image = read_image(noise())
    assert torch.equal(to_pixels(image, ImageSpec(64)), torch.tensor(np.asarray(image)).permute(2, 0, 1))


def test_resize_keeps_both_ends_of_a_wide_image() -> None:
    wide = Image.new("RGB", (40, 10))
    wide.paste((255, 255, 255), (36, 0, 40, 10))
    row = to_pixels(wide, ImageSpec(10))[0, 5]
    assert row[:8].max() < 32
    assert row[9] > 223


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 1001 + height).integers(0, 256, (height, width, 3), np.uint8))


def planes(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)


def colours(pixels: torch.Tensor) -> list[list[tuple[int, ...]]]:
    return [[tuple(pixel) for pixel in row] for row in pixels.permute(1, 2, 0).tolist()]


@given(width=sides, height=sides, size=st.integers(1, 40), way=st.sampled_from(WAYS))
def test_every_shape_becomes_a_square_of_bytes(width: int, height: int, size: int, way: Way) -> None:
    pixels = to_pixels(picture(width, height), ImageSpec(size, way, GREEN))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, size, size)
    assert pixels.is_contiguous()


@given(width=sides, height=sides, size=st.integers(1, 40))
def test_naive_is_the_resize_of_pillow(width: int, height: int, size: int) -> None:
    image = picture(width, height)
    expected = planes(image.resize((size, size), Image.Resampling.BICUBIC))
    assert torch.equal(to_pixels(image, ImageSpec(size)), expected)


@given(side=sides, size=st.integers(1, 40), way=st.sampled_from(WAYS[1:]))
def test_of_a_square_all_ways_are_one(side: int, size: int, way: Way) -> None:
    image = picture(side, side)
    assert torch.equal(to_pixels(image, ImageSpec(size, way, GREEN)), to_pixels(image, ImageSpec(size)))


def torchvisions(image: Image.Image, size: int, fill: tuple[int, int, int] | None) -> torch.Tensor:
    """The transforms of Prismatic: its letterbox unless `fill` is None, then torchvision's Resize and CenterCrop."""
    if fill is not None:
        across, down = (int((max(image.size) - side) / 2) for side in image.size)
        image = functional.pad(image, [across, down, across, down], fill=list(fill))
    return planes(CenterCrop(size)(Resize(size, InterpolationMode.BICUBIC)(image)))


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40))
def test_crop_and_letterbox_are_those_of_the_papers_code(width: int, height: int, size: int) -> None:
    image = picture(width, height)
    if max(width, height) <= 16 * min(width, height):
        cropped = to_pixels(image, ImageSpec(size, "resize-crop"))
        assert torch.equal(cropped, torchvisions(image, size, None))
    assert torch.equal(to_pixels(image, ImageSpec(size, "letterbox", BLUE)), torchvisions(image, size, BLUE))


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("size", [(640, 427), (427, 640), (1001, 77), (333, 500)])
def test_crop_and_letterbox_of_photographs(name: str, size: tuple[int, int]) -> None:
    image = Image.fromarray(load_sample_image(name)).resize(size)
    assert torch.equal(to_pixels(image, ImageSpec(384, "resize-crop")), torchvisions(image, 384, None))
    assert torch.equal(to_pixels(image, ImageSpec(224, "letterbox", RED)), torchvisions(image, 224, RED))


@given(width=sides, height=sides, size=st.integers(1, 40))
def test_a_solid_colour_stays_itself(width: int, height: int, size: int) -> None:
    for way in WAYS[:2]:
        pixels = to_pixels(Image.new("RGB", (width, height), RED), ImageSpec(size, way, BLUE))
        assert {pixel for row in colours(pixels) for pixel in row} == {RED}


def test_letterbox_lies_in_the_middle_of_the_fill() -> None:
    wide = colours(to_pixels(Image.new("RGB", (8, 4), RED), ImageSpec(8, "letterbox", BLUE)))
    assert wide == [[BLUE] * 8] * 2 + [[RED] * 8] * 4 + [[BLUE] * 8] * 2
    tall = colours(to_pixels(Image.new("RGB", (4, 8), RED), ImageSpec(8, "letterbox", BLUE)))
    assert tall == [[BLUE] * 2 + [RED] * 4 + [BLUE] * 2] * 8


def test_letterbox_of_a_strip_takes_no_memory_for_a_square_of_its_length() -> None:
    strip = Image.new("RGB", (10, 1_000_000), RED)  # padded to a square it would be 4,000 GB
    pixels = to_pixels(strip, ImageSpec(9, "letterbox", BLUE))
    assert pixels[:, 4, 0].tolist() == list(BLUE)
    assert pixels.shape == (3, 9, 9)


@pytest.mark.parametrize("upright", [False, True])
def test_crop_keeps_the_middle_of_the_longer_side(upright: bool) -> None:
    image = picture(48, 16)
    expected = planes(image)[:, :, 16:32]
    if upright:
        image, expected = image.transpose(Image.Transpose.TRANSPOSE), expected.transpose(1, 2)
    assert torch.equal(to_pixels(image, ImageSpec(16, "resize-crop")), expected)


def test_crop_is_the_resize_of_the_shorter_side_and_then_the_middle() -> None:
    image = picture(60, 20)
    whole = planes(image.resize((30, 10), Image.Resampling.BICUBIC))
    assert torch.equal(to_pixels(image, ImageSpec(10, "resize-crop")), whole[:, :, 10:20])


def test_crop_of_a_strip_takes_no_memory_for_what_is_cut_off() -> None:
    strip = Image.new("RGB", (1, 3_000_000), RED)  # 384 px wide and uncropped it would be 10^11 pixels
    pixels = to_pixels(strip, ImageSpec(384, "resize-crop"))
    assert (pixels == torch.tensor(RED).view(3, 1, 1)).all()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif"])
def test_truncated_image_cannot_be_decoded(tmp_path: Path, kind: str) -> None:
    raw = {"png": noise, "jpeg": ENCODINGS["jpeg"], "gif": ENCODINGS["gif"]}[kind]()
    (tmp_path / "cut").write_bytes(raw[: len(raw) // 3])
    with pytest.raises(DataError, match=r"cut: cannot be decoded"):
        read_image(tmp_path / "cut")


@pytest.mark.parametrize("raw", [b"", b"GIF89a", b"no image at all", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image(raw: bytes) -> None:
    with pytest.raises(DataError, match="image bytes: cannot be decoded"):
        read_image(raw)


def test_text_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"notes\.txt: cannot be decoded"):
        read_image(tmp_path / "notes.txt")


def test_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", str(tmp_path / "none.png")):
        with pytest.raises(DataError, match=r"none\.png: no such image file"):
            read_image(path)


def test_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb.png").write_bytes(noise()[:200])
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(DataError, match=r"bomb\.png: 64 x 64 pixels; at most 4095"):
        read_image(tmp_path / "bomb.png")


def test_as_many_pixels_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 64 * 64)
    assert read_image(noise()).size == (64, 64)


def test_pillows_own_limit_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(DataError, match="image bytes"):
        read_image(noise())


def test_pillows_warning_stays_silent_below_our_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    assert read_image(noise()).size == (64, 64)
