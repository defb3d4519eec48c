"""Image decoding to RGB (allowed formats, EXIF orientation, 8 bits per channel) and re-encoding at a smaller size.

`read_image` is the one reader of training, generation, verification and inspection; conversion asks it where in doubt.
Imports no torch.
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

Image.init()  # PIL opens a format by name only once it knows all
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")  # others may start other programs
MODES = {"JPEG": {"L", "RGB", "CMYK"}, "PNG": {"L", "LA", "RGB", "RGBA"}, "WEBP": {"RGB", "RGBA"}}
MAX_PIXELS = 100_000_000  # a decompression bomb is refused before it is decoded
PNG, TEXT_CHUNKS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
LONG_TEXT = 1 << 16  # bytes
MIN_IS_WHITE, SIGNED = 0, 2  # of TIFF; PIL inverts at 8 bits only
DARK = 16  # of 255: what stays below was kept in few bits of many
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

ImageLike = str | Path | bytes | Image.Image


def read_image(image: ImageLike) -> Image.Image:
    """Decode a file, bytes or a PIL image to RGB: EXIF orientation applied, transparency composited onto white.

    Of an animation it is the first frame. Of 16 bits the upper 8 are kept; floats are 0…1; 32-bit integers of at most
    255 are taken as 8 bits, as PIL takes them.

    Raises:
        DataError: it cannot be found or decoded, has more than `MAX_PIXELS` pixels, or its floats or integers are out
            of range or would be almost black.
    """
    what = "image bytes" if isinstance(image, bytes) else str(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, where our own limit follows; of damage that does no harm
            if not isinstance(image, ImageLike):
                raise DataError(f"a {type(image).__name__} is no image; give a path, encoded bytes or a PIL image")
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
    """An opened image with its pixels, EXIF orientation applied; integers and floats as 8 bits, see `read_image`.

    Args:
        image: as PIL opened it.
        what: its name, for messages.

    Raises:
        DataError: floats or integers are out of range. PIL's decoders may raise anything else.
    """
    tags = getattr(image, "tag_v2", {})
    inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == MIN_IS_WHITE
    if tags.get(ExifTags.Base.SampleFormat) in (SIGNED, (SIGNED,)) and image.mode == "L":
        raise DataError(f"{what}: signed bytes; 0 to 255 are allowed, so shift them")
    raw = str(getattr(getattr(image, "png", None), "im_rawmode", ""))  # of a PNG, how its pixels are kept
    if "transparency" in image.info and not isinstance(image.info["transparency"], bytes):
        image.info["transparency"] = _transparent(image.info["transparency"], raw)
    image.load()
    image = _upright(image)
    if image.mode[0] in "IF":
        return _eight_bits(image, what, inverted)
    if raw.endswith(";16B") and 0 < max(high for _, high in _extrema(image)) < DARK:
        raise DataError(f"{what}: 16 bits of which the upper 8 are below {DARK}, almost black; scale them")
    return image


def _extrema(image: Image.Image) -> list[tuple[float, float]]:
    """The lowest and highest value of each channel of colour."""
    bands = image.split()[: 1 if image.mode == "LA" else 3]
    return [cast(tuple[float, float], band.getextrema()) for band in bands]


def _transparent(value: Any, raw: str) -> Any:
    """The transparent value of a PNG at the depth to which PIL decodes it."""
    if raw in ("L;2", "L;4"):
        return value * {"L;2": 85, "L;4": 17}[raw]
    return tuple(part >> 8 for part in value) if raw == "RGB;16B" else value


def open_image(image: str | Path | bytes) -> Image.Image:
    """An image of which only the header is read, from a file or its bytes; PIL may raise anything."""
    if not isinstance(image, bytes):
        with Path(image).open("rb") as file:
            if file.read(len(PNG)) != PNG:
                return Image.open(image, formats=FORMATS)
            image = PNG + file.read()
    return Image.open(io.BytesIO(_without_long_texts(image)), formats=FORMATS)


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


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{what}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are allowed")
    image = decoded(image, what)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _without_long_texts(data: bytes) -> bytes:
    """A PNG without text and colour profiles beyond `LONG_TEXT`, for which PIL would refuse it; other bytes as is."""
    kept, start, at = [], 0, len(PNG)
    kind = b"" if data.startswith(PNG) else b"IEND"
    while kind != b"IEND" and at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind in TEXT_CHUNKS and _is_long(data[at + 8 : end - 4], kind):
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data


def _is_long(text: bytes, kind: bytes) -> bool:
    """Check whether the content of a text chunk, once inflated, is longer than `LONG_TEXT`."""
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
    """PIL's own `exif_transpose` also writes the EXIF data anew, which fails where any part of them is damaged."""
    orientation = None
    with contextlib.suppress(Exception):  # EXIF data that cannot be read turn nothing
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _eight_bits(image: Image.Image, what: str, inverted: bool) -> Image.Image:
    """Grey of 16 or 32 bits or of floats, which PIL would clip to white or black, as grey of 8 bits."""
    values, limit = np.asarray(image), 1 if image.mode == "F" else 65_535
    lowest, highest = values.min(), values.max()
    found = f"values from {lowest} to {highest} (mode {image.mode})"
    if not 0 <= lowest <= highest <= limit:  # NaN is none of them
        raise DataError(f"{what}: {found}; 0 to {limit} are allowed, so scale them")
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    if image.mode == "I" and highest <= 255 and image.format != "PPM":  # which PIL scales to 16 bits
        limit = 255
    values = limit - values if inverted else values
    scaled = np.rint(values * 255) if image.mode == "F" else values if limit == 255 else values >> 8
    if 0 < values.max() and scaled.max() < DARK:
        raise DataError(f"{what}: {found} would be almost black, as white is {limit}; scale them")
    grey = Image.fromarray(scaled.astype(np.uint8))
    if alpha is not None:
        grey.putalpha(alpha)
    return grey
