"""Reading images of every kind and resizing them to uint8 pixels."""

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
from ssmvl.interfaces import Resize as ResizeMode
from ssmvl.processing import image_decoding
from ssmvl.processing.transforms import read_image, to_pixels

GREEN, RED, BLUE = (0, 255, 0), (255, 0, 0), (0, 0, 255)
MODES: tuple[ResizeMode, ...] = ("resize-naive", "resize-crop", "letterbox")
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
def test_16_bit_images_keep_their_brightness(kind: str) -> None:
    image = read_image(encoded(Image.fromarray(np.full((6, 8), 32_768, np.uint16)), kind))
    assert np.abs(np.asarray(image).astype(int) - 128).max() <= 1


def test_gray_and_black_and_white() -> None:
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


def test_an_animation_gives_its_first_frame_and_its_file_is_closed(tmp_path: Path) -> None:
    green().save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (8, 6), "red")])
    assert read_image(tmp_path / "a.gif").getpixel((0, 0)) == GREEN


def test_takes_a_pil_image() -> None:
    assert read_image(green("RGBA")).mode == "RGB"


@pytest.mark.parametrize("size", [1, 5, 48])
def test_pixels_are_uint8_planes_of_the_requested_size(size: int) -> None:
    pixels = to_pixels(green(), ImageSpec(size))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, size, size)
    assert pixels.is_contiguous()
    assert (pixels == torch.tensor(GREEN).view(3, 1, 1)).all()


def test_an_image_of_the_requested_size_is_unchanged() -> None:
    image = read_image(noise())
    assert torch.equal(to_pixels(image, ImageSpec(64)), torch.tensor(np.asarray(image)).permute(2, 0, 1))


def test_resize_keeps_both_ends_of_a_wide_image() -> None:
    wide = Image.new("RGB", (40, 10))
    wide.paste((255, 255, 255), (36, 0, 40, 10))
    row = to_pixels(wide, ImageSpec(10))[0, 5]
    assert row[:8].max() < 32
    assert row[9] > 223


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 1001 + height).integers(0, 256, (height, width, 3), np.uint8))


def planes(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)


def colors(pixels: torch.Tensor) -> list[list[tuple[int, ...]]]:
    return [[tuple(pixel) for pixel in row] for row in pixels.permute(1, 2, 0).tolist()]


@given(width=sides, height=sides, size=st.integers(1, 40), mode=st.sampled_from(MODES))
def test_every_shape_becomes_a_square_of_bytes(width: int, height: int, size: int, mode: ResizeMode) -> None:
    pixels = to_pixels(noise_image(width, height), ImageSpec(size, mode, GREEN))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, size, size)
    assert pixels.is_contiguous()


@given(width=sides, height=sides, size=st.integers(1, 40))
def test_naive_equals_pillows_resize(width: int, height: int, size: int) -> None:
    image = noise_image(width, height)
    expected = planes(image.resize((size, size), Image.Resampling.BICUBIC))
    assert torch.equal(to_pixels(image, ImageSpec(size)), expected)


@given(side=sides, size=st.integers(1, 40), mode=st.sampled_from(MODES[1:]))
def test_all_modes_are_equal_for_a_square_image(side: int, size: int, mode: ResizeMode) -> None:
    image = noise_image(side, side)
    assert torch.equal(to_pixels(image, ImageSpec(size, mode, GREEN)), to_pixels(image, ImageSpec(size)))


def torchvision_pixels(image: Image.Image, size: int, fill: tuple[int, int, int] | None) -> torch.Tensor:
    """The transforms of Prismatic: its letterbox unless `fill` is None, then torchvision's Resize and CenterCrop."""
    if fill is not None:
        across, down = (int((max(image.size) - side) / 2) for side in image.size)
        image = functional.pad(image, [across, down, across, down], fill=list(fill))
    return planes(CenterCrop(size)(Resize(size, InterpolationMode.BICUBIC)(image)))


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40))
def test_crop_and_letterbox_equal_those_of_the_papers_code(width: int, height: int, size: int) -> None:
    image = noise_image(width, height)
    if max(width, height) <= 16 * min(width, height):
        cropped = to_pixels(image, ImageSpec(size, "resize-crop"))
        assert torch.equal(cropped, torchvision_pixels(image, size, None))
    assert torch.equal(to_pixels(image, ImageSpec(size, "letterbox", BLUE)), torchvision_pixels(image, size, BLUE))


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("size", [(640, 427), (427, 640), (1001, 77), (333, 500)])
def test_crop_and_letterbox_of_photographs(name: str, size: tuple[int, int]) -> None:
    image = Image.fromarray(load_sample_image(name)).resize(size)
    assert torch.equal(to_pixels(image, ImageSpec(384, "resize-crop")), torchvision_pixels(image, 384, None))
    assert torch.equal(to_pixels(image, ImageSpec(224, "letterbox", RED)), torchvision_pixels(image, 224, RED))


@given(width=sides, height=sides, size=st.integers(1, 40))
def test_a_solid_color_is_unchanged(width: int, height: int, size: int) -> None:
    for mode in MODES[:2]:
        pixels = to_pixels(Image.new("RGB", (width, height), RED), ImageSpec(size, mode, BLUE))
        assert {pixel for row in colors(pixels) for pixel in row} == {RED}


def test_letterbox_centers_the_image_in_the_fill() -> None:
    wide = colors(to_pixels(Image.new("RGB", (8, 4), RED), ImageSpec(8, "letterbox", BLUE)))
    assert wide == [[BLUE] * 8] * 2 + [[RED] * 8] * 4 + [[BLUE] * 8] * 2
    tall = colors(to_pixels(Image.new("RGB", (4, 8), RED), ImageSpec(8, "letterbox", BLUE)))
    assert tall == [[BLUE] * 2 + [RED] * 4 + [BLUE] * 2] * 8


def test_letterbox_of_a_strip_allocates_no_square_of_its_length() -> None:
    strip = Image.new("RGB", (10, 1_000_000), RED)  # 4,000 GB if padded to a square
    pixels = to_pixels(strip, ImageSpec(9, "letterbox", BLUE))
    assert pixels[:, 4, 0].tolist() == list(BLUE)
    assert pixels.shape == (3, 9, 9)


@pytest.mark.parametrize("upright", [False, True])
def test_crop_keeps_the_middle_of_the_longer_side(upright: bool) -> None:
    image = noise_image(48, 16)
    expected = planes(image)[:, :, 16:32]
    if upright:
        image, expected = image.transpose(Image.Transpose.TRANSPOSE), expected.transpose(1, 2)
    assert torch.equal(to_pixels(image, ImageSpec(16, "resize-crop")), expected)


def test_crop_resizes_the_shorter_side_and_then_takes_the_middle() -> None:
    image = noise_image(60, 20)
    resized = planes(image.resize((30, 10), Image.Resampling.BICUBIC))
    assert torch.equal(to_pixels(image, ImageSpec(10, "resize-crop")), resized[:, :, 10:20])


def test_crop_of_a_strip_allocates_no_memory_for_the_cropped_part() -> None:
    strip = Image.new("RGB", (1, 3_000_000), RED)  # 10^11 pixels if resized to a width of 384 px uncropped
    pixels = to_pixels(strip, ImageSpec(384, "resize-crop"))
    assert (pixels == torch.tensor(RED).view(3, 1, 1)).all()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif"])
def test_truncated_image_cannot_be_decoded(tmp_path: Path, kind: str) -> None:
    raw = {"png": noise, "jpeg": ENCODINGS["jpeg"], "gif": ENCODINGS["gif"]}[kind]()
    (tmp_path / "cut").write_bytes(raw[: len(raw) // 3])
    with pytest.raises(DataError, match=r"cut: cannot be decoded"):
        read_image(tmp_path / "cut")


@pytest.mark.parametrize("raw", [b"", b"GIF89a", b"no image at all", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_not_an_image(raw: bytes) -> None:
    with pytest.raises(DataError, match="image bytes: cannot be decoded"):
        read_image(raw)


def test_a_text_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"notes\.txt: cannot be decoded"):
        read_image(tmp_path / "notes.txt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", str(tmp_path / "none.png")):
        with pytest.raises(DataError, match=r"none\.png: no such image file"):
            read_image(path)


def test_a_directory_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path)


def test_too_many_pixels_are_rejected_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb.png").write_bytes(noise()[:200])
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(DataError, match=r"bomb\.png: 64 x 64 pixels; at most 4095"):
        read_image(tmp_path / "bomb.png")


def test_the_maximal_number_of_pixels_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 64 * 64)
    assert read_image(noise()).size == (64, 64)


def test_pillows_own_limit_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(DataError, match="image bytes"):
        read_image(noise())


def test_pillows_warning_is_suppressed_below_our_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    assert read_image(noise()).size == (64, 64)
