"""Image decoding to RGB (allowed formats, EXIF orientation, 8 bits per channel) and re-encoding at a smaller size.

Training, generation, verification and inspection all read images with `read_image`; conversion calls it in doubtful
cases. Imports no torch.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import ExifTags, Image

from ssmvl.errors import DataError, short

Image.init()  # PIL can open a format by name only after all plugins are loaded
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")  # other formats may start external programs
MODES = {"JPEG": {"L", "RGB", "CMYK"}, "PNG": {"L", "LA", "RGB", "RGBA"}, "WEBP": {"RGB", "RGBA"}}
MAX_PIXELS = 100_000_000  # a decompression bomb is rejected before it is decoded
PNG, TEXT_CHUNKS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
LONG_TEXT = 1 << 16  # bytes
MIN_IS_WHITE, SIGNED = 0, 2  # TIFF tag values; PIL inverts 8-bit images only
DARK = 16  # of 255; a lower maximum means that only the low bits of a wider type are used
Transpose = Image.Transpose
UPRIGHT = {  # EXIF orientation -> the transpose that makes the image upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

ImageLike = str | Path | bytes | Image.Image


def read_image(image: ImageLike) -> Image.Image:
    """Decode a file, bytes or a PIL image to RGB: EXIF orientation applied, transparency composited onto white.

    An animation is reduced to its first frame. 16-bit values keep their upper 8 bits; floats are 0…1; 32-bit integers
    of at most 255 are read as 8-bit values, as in PIL.

    Raises:
        DataError: the image cannot be found or decoded, has more than `MAX_PIXELS` pixels, or its floats or integers
            are out of range or would be almost black.
    """
    what = "image bytes" if isinstance(image, bytes) else str(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs, which our own limit rejects below, and harmless damage
            if not isinstance(image, ImageLike):
                kind = type(image).__name__
                raise DataError(f"an image must be a path, encoded bytes or a PIL image, received a {kind}")
            if isinstance(image, Image.Image):
                return _to_rgb(image, what)
            with open_image(image) as opened:
                return _to_rgb(opened, what)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{what}: no such image file") from error
    except Exception as error:  # PIL's decoders may raise anything on damaged bytes
        raise DataError(f"{what}: cannot be decoded as an image ({type(error).__name__}: {reason(error)})") from error


def decoded(image: Image.Image, what: str) -> Image.Image:
    """Decode an opened image: EXIF orientation applied, integers and floats as 8 bits; see `read_image`.

    Args:
        image: opened by PIL.
        what: name of the image, for messages.

    Raises:
        DataError: floats or integers are out of range. PIL's decoders may raise any other error.
    """
    tags = getattr(image, "tag_v2", {})
    inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == MIN_IS_WHITE
    if tags.get(ExifTags.Base.SampleFormat) in (SIGNED, (SIGNED,)) and image.mode == "L":
        raise DataError(f"{what}: signed bytes are not supported; shift the values to 0 to 255")
    raw = str(getattr(getattr(image, "png", None), "im_rawmode", ""))  # pixel format of a PNG
    if "transparency" in image.info and not isinstance(image.info["transparency"], bytes):
        image.info["transparency"] = _transparent(image.info["transparency"], raw)
    image.load()
    image = _upright(image)
    if image.mode[0] in "IF":
        return _eight_bits(image, what, inverted)
    if raw.endswith(";16B") and 0 < max(high for _, high in _extrema(image)) < DARK:
        raise DataError(
            f"{what}: all 16-bit values are below {DARK << 8}, so the image would be almost black; scale them"
        )
    return image


def _extrema(image: Image.Image) -> list[tuple[float, float]]:
    """The lowest and highest value of each color channel."""
    bands = image.split()[: 1 if image.mode == "LA" else 3]
    return [cast(tuple[float, float], band.getextrema()) for band in bands]


def _transparent(value: Any, raw: str) -> Any:
    """The transparent value of a PNG at the bit depth to which PIL decodes it."""
    if raw in ("L;2", "L;4"):
        return value * {"L;2": 85, "L;4": 17}[raw]
    return tuple(part >> 8 for part in value) if raw == "RGB;16B" else value


def open_image(image: str | Path | bytes) -> Image.Image:
    """Open an image from a file or its bytes and read only the header; PIL may raise any error."""
    if not isinstance(image, bytes):
        with Path(image).open("rb") as file:
            if file.read(len(PNG)) != PNG:
                return Image.open(image, formats=FORMATS)
            image = PNG + file.read()
    return Image.open(io.BytesIO(_without_long_texts(image)), formats=FORMATS)


def shrunk(data: bytes, max_side: int) -> bytes:
    """Limit the longer side of an image to `max_side` pixels: unchanged bytes, or a smaller image, re-encoded.

    JPEG (quality 95), PNG and WebP keep their format; others become PNG. An animation keeps only its first frame.

    Raises:
        DataError: the image cannot be decoded.
    """
    with opened(data) as image:
        if max(image.size) <= max_side:
            return data
        kind = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP"}.get(image.format or "", "PNG")
        box, filter_ = (max_side, max_side), Image.Resampling.LANCZOS
        if kind == "JPEG":  # before the pixels are decoded, because a JPEG can be decoded at a reduced size
            image.thumbnail(box, filter_, reducing_gap=3.0)
        image = decoded(image, "its pixels")
        if image.mode not in MODES[kind] or "transparency" in image.info:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.thumbnail(box, filter_, reducing_gap=3.0)
        encoded = io.BytesIO()
        image.save(encoded, kind, **({} if kind == "PNG" else {"quality": 95}))
    return encoded.getvalue()


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image and read only its header; any error raised while it is open becomes a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels raise an error
            with open_image(data) as image:
                yield image
    except Exception as error:  # each of PIL's decoders raises its own errors
        raise DataError(f"cannot be decoded as an image ({short(reason(error))})") from error


def reason(error: Exception) -> str:
    """The error's message without addresses of Python objects, which differ from run to run."""
    return re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{what}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are allowed")
    image = decoded(image, what)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _without_long_texts(data: bytes) -> bytes:
    """Drop text and color profiles longer than `LONG_TEXT` from a PNG, which PIL would reject; keep other bytes."""
    kept, start, offset = [], 0, len(PNG)
    kind = b"" if data.startswith(PNG) else b"IEND"
    while kind != b"IEND" and offset + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + length
        if kind in TEXT_CHUNKS and _is_long(data[offset + 8 : end - 4], kind):
            kept.append(data[start:offset])
            start = end
        offset = end
    return b"".join([*kept, data[start:]]) if kept else data


def _is_long(text: bytes, kind: bytes) -> bool:
    """Return True if the decompressed content of a text chunk is longer than `LONG_TEXT`."""
    if len(text) > LONG_TEXT:
        return True
    _, _, rest = text.partition(b"\0")
    if kind == b"tEXt" or (kind == b"iTXt" and not rest.startswith(b"\1")):
        return False
    compressed = (
        rest[1:] if kind in (b"zTXt", b"iCCP") else rest[2:].split(b"\0", 2)[-1]
    )  # after language and translation
    inflating = zlib.decompressobj()
    with contextlib.suppress(zlib.error):
        return len(inflating.decompress(compressed, LONG_TEXT + 1)) > LONG_TEXT
    return False


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. PIL's `exif_transpose` also rewrites the EXIF data, which fails if any is damaged."""
    orientation = None
    with contextlib.suppress(Exception):  # unreadable EXIF data rotate nothing
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _eight_bits(image: Image.Image, what: str, inverted: bool) -> Image.Image:
    """Convert gray of 16 or 32 bits or floats, which PIL would clip to white or black, to 8 bits."""
    values, limit = np.asarray(image), 1 if image.mode == "F" else 65_535
    lowest, highest = values.min(), values.max()
    value_range = f"values from {lowest} to {highest} (mode {image.mode})"
    if not 0 <= lowest <= highest <= limit:  # False for NaN
        raise DataError(f"{what}: {value_range}; scale them to 0 to {limit}")
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    if image.mode == "I" and highest <= 255 and image.format != "PPM":  # PIL scales a PPM to 16 bits
        limit = 255
    values = limit - values if inverted else values
    scaled = np.rint(values * 255) if image.mode == "F" else values if limit == 255 else values >> 8
    if 0 < values.max() and scaled.max() < DARK:
        raise DataError(f"{what}: {value_range} would be almost black, because white is {limit}; scale them")
    gray = Image.fromarray(scaled.astype(np.uint8))
    if alpha is not None:
        gray.putalpha(alpha)
    return gray
