"""Detection of damaged images without decoding them, and shrinking of images."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from ssmvl.data.conversion.images import TAIL, damage
from ssmvl.errors import DataError
from ssmvl.processing.image_decoding import shrunk
from ssmvl.processing.transforms import read_image


def two_colors(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Return an image whose left half is red and right half blue; opaque in modes with alpha."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 200, 200
    return Image.fromarray(pixels).convert(mode)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    written = io.BytesIO()
    (image or two_colors()).save(written, kind, **options)
    return written.getvalue()


COMPLETE: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded("JPEG"),
    "progressive": lambda: encoded("JPEG", progressive=True),
    "cmyk": lambda: encoded("JPEG", two_colors(mode="CMYK")),
    "png": lambda: encoded("PNG"),
    "gif": lambda: encoded("GIF"),
    "animated gif": lambda: encoded("GIF", save_all=True, append_images=[two_colors(mode="L")]),
    "webp": lambda: encoded("WEBP"),
    "lossless webp": lambda: encoded("WEBP", lossless=True),
    "animated webp": lambda: encoded("WEBP", save_all=True, append_images=[two_colors().rotate(180)]),
}


@pytest.mark.parametrize("kind", COMPLETE)
def test_complete_images_pass_and_truncated_ones_only_if_they_decode(kind: str) -> None:
    data = COMPLETE[kind]()
    assert damage(data) == ""
    cuts = [at for at in range(len(data)) if not damage(data[:at])]
    for at in cuts:  # every pixel of the first frame is present
        assert np.array_equal(read_image(data[:at]), read_image(data))


def test_trailing_bytes_are_allowed_and_damage_is_reported() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        for more in (b"\0\0", b"trailing", b"\0\0\0\x18ftypmp42" * TAIL):  # like the video of a motion photo
            assert damage(encoded(kind) + more) == ""
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        message = damage(encoded(kind)[:-100])
        assert message.startswith(f"not a valid {kind if kind != 'WEBP' else 'WebP'} (")
        assert "cannot be decoded" in message


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"a text", b"\0" * 1000, b"PK\3\4", b"\xff\xd8", b"GIF90a"])
def test_other_data_is_damage(data: bytes) -> None:
    assert damage(data)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM"])
def test_other_formats_are_decoded(kind: str) -> None:
    assert damage(encoded(kind)) == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_a_small_image_keeps_its_bytes(kind: str) -> None:
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
        ("PNG", "I;16", "PNG", "L"),
        ("WEBP", "RGB", "WEBP", "RGB"),
        ("GIF", "P", "PNG", "RGB"),
        ("BMP", "RGB", "PNG", "RGB"),
        ("TIFF", "CMYK", "PNG", "RGB"),
    ],
)
def test_a_large_image_is_shrunk(kind: str, mode: str, becomes: str, becomes_mode: str) -> None:
    image = two_colors(300, 200, "L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 256)
    data = shrunk(encoded(kind, image), 60)
    assert damage(data) == ""
    with Image.open(io.BytesIO(data)) as smaller:
        assert (smaller.format, smaller.mode, smaller.size) == (becomes, becomes_mode, (60, 40))
        image = two_colors(300, 200, "L") if mode == "I;16" else image
        expected = np.asarray(image.convert("RGB").resize((60, 40), Image.Resampling.LANCZOS)).astype(int)
        error = np.abs(np.asarray(smaller.convert("RGB")) - expected)[:, np.r_[:26, 34:60]]
    assert error.max() <= (0 if becomes == "PNG" and mode != "CMYK" else 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[:100, :150], pixels[:100, 150:], pixels[100:, :150] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    rotated = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]}
    upright = rotated.get(orientation)
    if upright is None:  # 5 to 8 swap the sides
        swapped = pixels.swapaxes(0, 1)
        upright = {5: swapped, 6: swapped[:, ::-1], 7: swapped[::-1, ::-1], 8: swapped[::-1]}[orientation]
    data = shrunk(encoded("JPEG", Image.fromarray(pixels), exif=exif, quality=95), 60)
    expected = Image.fromarray(np.ascontiguousarray(upright)).resize((60, 40) if orientation < 5 else (40, 60))
    with Image.open(io.BytesIO(data)) as smaller:
        assert smaller.size == expected.size
        assert not smaller.getexif().get(0x0112, 0) > 1
        assert np.abs(np.asarray(smaller).astype(int) - np.asarray(expected)).mean() < 4


def test_shrinking_keeps_the_first_frame_and_transparency() -> None:
    frames = {"save_all": True, "append_images": [Image.new("RGB", (100, 50), "white")]}
    for kind in ("GIF", "WEBP"):
        with Image.open(io.BytesIO(shrunk(encoded(kind, Image.new("RGB", (100, 50), "red"), **frames), 20))) as image:
            assert getattr(image, "n_frames", 1) == 1
            red, green, _ = image.convert("RGB").getpixel((10, 5))
            assert red > 240 > 20 > green
    with Image.open(io.BytesIO(shrunk(encoded("WEBP", Image.new("RGBA", (100, 50))), 20))) as image:
        assert (image.format, image.convert("RGBA").getpixel((5, 5))[3]) == ("WEBP", 0)
    with Image.open(io.BytesIO(shrunk(encoded("PNG", two_colors(), transparency=(200, 0, 0)), 20))) as image:
        alphas = [image.convert("RGBA").getpixel((column, 5))[3] for column in (2, 17)]
        assert (image.mode, alphas) == ("RGBA", [0, 255])
    palette = Image.new("P", (100, 50), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    with Image.open(io.BytesIO(shrunk(encoded("PNG", palette, transparency=1), 20))) as image:
        assert image.convert("RGBA").getpixel((5, 5))[3] == 0


@pytest.mark.parametrize("data", [encoded("PNG", two_colors(300, 200))[:300], b"no image", b""])
def test_undecodable_images_cannot_be_shrunk(data: bytes) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        shrunk(data, 20)


def gradient_16() -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return a 16-bit gray gradient from left to right, 300 wide."""
    return np.repeat(np.linspace(3_000, 60_000, 300).astype(np.uint16)[None], 200, axis=0)


def with_exif(kind: str, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(kind, two_colors(300, 200), exif=exif, **options)


def with_damaged_exif() -> bytes:
    """Return a JPEG that the loader rotates, but on which PIL's `exif_transpose` fails."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.XResolution] = 6, 72.0
    raw = bytearray(encoded("JPEG", two_colors(300, 200), exif=exif))
    start = raw.index(b"Exif\0\0") + 6
    entry = raw.index((0x011A).to_bytes(2, "little" if raw[start : start + 2] == b"II" else "big"), start)
    raw[entry + 3] ^= 0x02  # no longer a rational
    return bytes(raw)


def with_xmp() -> bytes:
    """Return a JPEG whose orientation is stored only as XMP data."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    raw, block = encoded("JPEG", two_colors(300, 200)), b"http://ns.adobe.com/xap/1.0/\0" + xmp
    return raw[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + raw[2:]


KINDS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded("JPEG", two_colors(300, 200)),
    "gray jpeg": lambda: encoded("JPEG", two_colors(300, 200, "L")),
    "cmyk jpeg": lambda: encoded("JPEG", two_colors(300, 200, "CMYK")),
    "palette": lambda: encoded("PNG", two_colors(300, 200, "P")),
    "bits": lambda: encoded("PNG", two_colors(300, 200, "1")),
    "transparent palette": lambda: encoded("GIF", two_colors(300, 200, "P"), transparency=0),
    "transparent color": lambda: encoded("PNG", two_colors(300, 200), transparency=(200, 0, 0)),
    "alpha": lambda: encoded("PNG", Image.new("RGBA", (300, 200), (200, 0, 0, 100))),
    "gray alpha": lambda: encoded("PNG", Image.new("LA", (300, 200), (50, 100))),
    "lab": lambda: encoded("TIFF", Image.new("LAB", (300, 200), (120, 140, 90))),
    "float": lambda: encoded("TIFF", Image.fromarray((gradient_16() / 65_535).astype(np.float32))),
    "16 bits": lambda: encoded("PNG", Image.fromarray(gradient_16())),
    "16 bits, rotated": lambda: encoded(
        "PNG", Image.fromarray(gradient_16()), exif=b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
    "16 bits, big-endian": lambda: encoded(
        "TIFF", Image.frombytes("I;16B", (300, 200), gradient_16().astype(">u2").tobytes())
    ),
    "16 bits, transparent": lambda: encoded(
        "PNG", Image.fromarray(np.where(gradient_16() < 30_000, 5_000, 40_000).astype(np.uint16)), transparency=40_000
    ),
    "32 bits": lambda: encoded("TIFF", Image.fromarray(gradient_16().astype(np.int32))),
    "rotated jpeg": lambda: with_exif("JPEG"),
    "rotated png": lambda: with_exif("PNG"),
    "rotated webp": lambda: with_exif("WEBP", lossless=True),
    "rotated tiff": lambda: with_exif("TIFF"),
    "damaged exif": with_damaged_exif,
    "xmp": with_xmp,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loader_reads_the_same_from_a_shrunk_image(kind: str) -> None:
    data = KINDS[kind]()
    large, small = read_image(data), read_image(shrunk(data, 60))
    assert sorted(small.size) == [40, 60]
    expected = large.resize(small.size, Image.Resampling.LANCZOS)
    assert (large.width > large.height) == (small.width > small.height)
    error = np.abs(np.asarray(small).astype(int) - np.asarray(expected))
    assert error.mean() < 2.5
    assert np.median(error) <= 2


def test_values_out_of_range_cannot_be_shrunk() -> None:
    with pytest.raises(DataError, match=r"cannot be decoded .* values from .*; scale them to 0 to 1"):
        shrunk(encoded("TIFF", Image.fromarray(gradient_16().astype(np.float32))), 60)
