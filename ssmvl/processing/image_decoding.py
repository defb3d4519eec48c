"""Image decoding (allowed formats, EXIF orientation, 8-bit channels) and re-encoding at a smaller size. No torch."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ssmvl.errors import DataError, short

Image.init()  # PIL opens a format by name only once it knows all
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")  # others may start other programs
MODES = {"JPEG": {"L", "RGB", "CMYK"}, "PNG": {"L", "LA", "RGB", "RGBA"}, "WEBP": {"RGB", "RGBA"}}
Turn = Image.Transpose
UPRIGHT = {  # what turns an image of that EXIF orientation upright
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_90,
}


def decoded(image: Image.Image, what: str) -> Image.Image:
    """An opened image with its pixels, turned as its EXIF data says.

    Of 16 bits the upper 8 are kept, and floats from 0 to 1 become 8 bits; other modes stay what they are.

    Args:
        image: as PIL opened it.
        what: its name, for messages.

    Raises:
        DataError: floats or integers are out of range. PIL's decoders may raise anything else.
    """
    image.load()
    image = _upright(image)
    return _eight_bits(image, what) if image.mode[0] in "IF" else image


def open_image(image: str | Path | bytes) -> Image.Image:
    """An image of which only the header is read, from a file or its bytes; PIL may raise anything."""
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS)


def shrunk(data: bytes, max_side: int) -> bytes:
    """An image whose longer side has at most `max_side` pixels: the very same bytes, or a smaller one encoded anew.

    JPEG (quality 95), PNG and WebP stay what they are, others become PNG; of an animation the first frame is kept.

    Raises:
        DataError: it cannot be decoded.
    """
    with opened(data) as image:
        if max(image.size) <= max_side:
            return data
        kind = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP"}.get(image.format or "", "PNG")
        box, way = (max_side, max_side), Image.Resampling.LANCZOS
        if kind == "JPEG":  # before its pixels are asked for, as it can be decoded at part of its size
            image.thumbnail(box, way, reducing_gap=3.0)
        image = decoded(image, "its pixels")
        if image.mode not in MODES[kind] or "transparency" in image.info:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.thumbnail(box, way, reducing_gap=3.0)
        written = io.BytesIO()
        image.save(written, kind, **({} if kind == "PNG" else {"quality": 95}))
    return written.getvalue()


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """An image of which only the header is read; whatever fails while it is open is a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
            with open_image(data) as image:
                yield image
    except Exception as error:  # each of PIL's decoders has errors of its own
        raise DataError(f"cannot be decoded as an image ({short(reason(error))})") from error


def reason(error: Exception) -> str:
    """What PIL says, without the address of a Python object, which is another one in each run."""
    return re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))


def _upright(image: Image.Image) -> Image.Image:
    """PIL's own `exif_transpose` also writes the EXIF data anew, which fails where any part of them is damaged."""
    orientation = None
    with contextlib.suppress(Exception):  # EXIF data that cannot be read turn nothing
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _eight_bits(image: Image.Image, what: str) -> Image.Image:
    """Grey of 16 bits or of floats, which PIL would clip to white or black, as grey of 8."""
    values, limit = np.asarray(image), 1 if image.mode == "F" else 65_535
    lowest, highest = values.min(), values.max()
    if not 0 <= lowest <= highest <= limit:  # NaN is none of them
        found = f"values from {lowest} to {highest} (mode {image.mode})"
        raise DataError(f"{what}: {found}; 0 to {limit} are allowed, so scale them")
    scaled = np.rint(values * 255) if image.mode == "F" else values >> 8
    grey = Image.fromarray(scaled.astype(np.uint8))
    if "transparency" in image.info:  # the value that is transparent
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey
