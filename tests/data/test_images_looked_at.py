"""Whether images are whole, without decoding them, and smaller ones of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssmvl.data.images import TAIL, damage, shrunk
from ssmvl.errors import DataError


def picture(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue; an opaque one in modes with alpha."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 200, 200
    return Image.fromarray(pixels).convert(mode)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    written = io.BytesIO()
    (image or picture()).save(written, kind, **options)
    return written.getvalue()


WHOLE: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded("JPEG"),
    "progressive": lambda: encoded("JPEG", progressive=True),
    "cmyk": lambda: encoded("JPEG", picture(mode="CMYK")),
    "png": lambda: encoded("PNG"),
    "gif": lambda: encoded("GIF"),
    "animated gif": lambda: encoded("GIF", save_all=True, append_images=[picture(mode="L")]),
    "webp": lambda: encoded("WEBP"),
    "lossless webp": lambda: encoded("WEBP", lossless=True),
    "animated webp": lambda: encoded("WEBP", save_all=True, append_images=[picture().rotate(180)]),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_image_is_not_damaged_and_every_cut_one_is(kind: str) -> None:
    data = WHOLE[kind]()
    assert damage(data) == ""
    cuts = [at for at in range(len(data)) if not damage(data[:at])]
    assert cuts == []


def test_bytes_after_the_end_are_allowed_and_damage_is_said() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert damage(encoded(kind) + b"trailing") == ""
    assert damage(encoded("JPEG") + b"\0" * (TAIL - 10)) == ""
    assert damage(encoded("GIF") + b"\0\0") == ""
    jpeg, webp = encoded("JPEG"), encoded("WEBP")
    assert damage(jpeg[:-100]) == f"no end marker of JPEG after {len(jpeg) - 100} bytes"
    assert damage(webp[:-1]) == f"{len(webp) - 1} bytes of a WebP that should have {len(webp)}"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"a text", b"\0" * 1000, b"PK\3\4", b"\xff\xd8", b"GIF90a"])
def test_what_is_no_image_is_damage(data: bytes) -> None:
    assert damage(data)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM"])
def test_other_images_need_a_known_header(kind: str) -> None:
    assert damage(encoded(kind)) == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_an_image_that_is_small_enough_keeps_its_bytes(kind: str) -> None:
    data = encoded(kind)
    assert shrunk(data, 60) == data
    assert shrunk(data + b"trailing", 61) == data + b"trailing"


@pytest.mark.parametrize(
    ("kind", "mode", "becomes", "becomes_mode"),
    [
        ("JPEG", "RGB", "JPEG", "RGB"),
        ("JPEG", "L", "JPEG", "L"),
        ("JPEG", "CMYK", "JPEG", "CMYK"),
        ("PNG", "RGB", "PNG", "RGB"),
        ("PNG", "RGBA", "PNG", "RGBA"),
        ("PNG", "LA", "PNG", "LA"),
        ("PNG", "P", "PNG", "RGB"),
        ("PNG", "1", "PNG", "RGB"),
        ("PNG", "I;16", "PNG", "I;16"),
        ("WEBP", "RGB", "WEBP", "RGB"),
        ("GIF", "P", "PNG", "RGB"),
        ("BMP", "RGB", "PNG", "RGB"),
        ("TIFF", "CMYK", "PNG", "RGB"),
    ],
)
def test_a_large_image_becomes_a_smaller_one(kind: str, mode: str, becomes: str, becomes_mode: str) -> None:
    image = picture(300, 200, "L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 256)
    data = shrunk(encoded(kind, image), 60)
    assert damage(data) == ""
    with Image.open(io.BytesIO(data)) as smaller:
        assert (smaller.format, smaller.mode, smaller.size) == (becomes, becomes_mode, (60, 40))
        if mode == "I;16":
            return
        expected = np.asarray(image.convert("RGB").resize((60, 40), Image.Resampling.LANCZOS)).astype(int)
        error = np.abs(np.asarray(smaller.convert("RGB")) - expected)[:, np.r_[:26, 34:60]]
    assert error.max() <= (0 if becomes == "PNG" and mode != "CMYK" else 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[:100, :150], pixels[:100, 150:], pixels[100:, :150] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    turned = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]}
    upright = turned.get(orientation)
    if upright is None:  # 5 to 8 swap the sides
        swapped = pixels.swapaxes(0, 1)
        upright = {5: swapped, 6: swapped[:, ::-1], 7: swapped[::-1, ::-1], 8: swapped[::-1]}[orientation]
    data = shrunk(encoded("JPEG", Image.fromarray(pixels), exif=exif, quality=95), 60)
    expected = Image.fromarray(np.ascontiguousarray(upright)).resize((60, 40) if orientation < 5 else (40, 60))
    with Image.open(io.BytesIO(data)) as smaller:
        assert smaller.size == expected.size
        assert not smaller.getexif().get(0x0112, 0) > 1
        assert np.abs(np.asarray(smaller).astype(int) - np.asarray(expected)).mean() < 4


def test_of_an_animation_the_first_frame_is_kept_and_transparency_stays() -> None:
    frames = {"save_all": True, "append_images": [Image.new("RGB", (100, 50), "white")]}
    for kind in ("GIF", "WEBP"):
        with Image.open(io.BytesIO(shrunk(encoded(kind, Image.new("RGB", (100, 50), "red"), **frames), 20))) as image:
            assert getattr(image, "n_frames", 1) == 1
            red, green, _ = image.convert("RGB").getpixel((10, 5))
            assert red > 240 > 20 > green
    with Image.open(io.BytesIO(shrunk(encoded("WEBP", Image.new("RGBA", (100, 50))), 20))) as image:
        assert (image.format, image.convert("RGBA").getpixel((5, 5))[3]) == ("WEBP", 0)
    with Image.open(io.BytesIO(shrunk(encoded("PNG", picture(), transparency=(200, 0, 0)), 20))) as image:
        alphas = [image.convert("RGBA").getpixel((column, 5))[3] for column in (2, 17)]
        assert (image.mode, alphas) == ("RGBA", [0, 255])
    palette = Image.new("P", (100, 50), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    with Image.open(io.BytesIO(shrunk(encoded("PNG", palette, transparency=1), 20))) as image:
        assert image.convert("RGBA").getpixel((5, 5))[3] == 0


@pytest.mark.parametrize("data", [encoded("PNG", picture(300, 200))[:300], b"no image", b""])
def test_what_cannot_be_decoded_cannot_be_shrunk(data: bytes) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        shrunk(data, 20)
