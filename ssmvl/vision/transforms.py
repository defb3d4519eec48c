"""From an image a user has to the uint8 pixels an encoder takes."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ssmvl.errors import DataError
from ssmvl.interfaces import ImageSpec

MAX_PIXELS = 100_000_000  # a decompression bomb is refused before it is decoded

ImageLike = str | Path | bytes | Image.Image

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


def read_image(image: ImageLike, largest: int | None = None) -> Image.Image:
    """Decode a file, bytes or a PIL image to RGB: turned as its EXIF data says, on white where it is transparent.

    Of an animation it is the first frame. Of 16 bits the upper 8 are kept; floats are 0…1.

    Args:
        image: what to decode.
        largest: the longest side, in pixels, of what is made of it. A JPEG whose sides are both at least four times as
            long is decoded at a half, a quarter or an eighth of its size, at least twice `largest`. All of it if None.

    Raises:
        DataError: it cannot be found or decoded, has more than `MAX_PIXELS` pixels, or floats or integers out of range.
    """
    what = "image bytes" if isinstance(image, bytes) else str(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, where our own limit follows; of damage that does no harm
            if not isinstance(image, ImageLike):
                raise DataError(f"a {type(image).__name__} is no image; give a path, encoded bytes or a PIL image")
            if isinstance(image, Image.Image):
                return _to_rgb(image, what)
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return _to_rgb(opened, what, largest)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{what}: no such image file") from error
    except Exception as error:  # PIL's decoders may raise anything on damaged bytes
        raise DataError(f"{what}: cannot be decoded as an image ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image, what: str, largest: int | None = None) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{what}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are allowed")
    if largest is not None:
        image.draft(None, (2 * largest, 2 * largest))  # JPEG only; less than twice would show in the resized image
    image.load()
    image = _upright(image)
    if image.mode[0] in "IF":
        image = _eight_bits(image, what)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


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


def to_pixels(image: Image.Image, spec: ImageSpec) -> Tensor:
    """An RGB image -> uint8 (3, S, S), brought to shape as `spec` says, bicubic."""
    (width, height), size = image.size, spec.size
    if spec.resize == "letterbox":
        inner = [max(1, round(side * size / max(width, height))) for side in (width, height)]
        square = Image.new("RGB", (size, size), spec.fill)
        square.paste(_resized(image, (inner[0], inner[1])), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    elif spec.resize == "resize-crop":  # only what is kept is resized: the whole of a long strip may not fit in memory
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2  # whole pixels: half a pixel would blur
        square = _resized(image, (size, size), (left, top, left + side, top + side))
    else:
        square = _resized(image, (size, size))
    planes = [np.frombuffer(square.tobytes("raw", band), np.uint8) for band in "RGB"]
    return torch.from_numpy(np.stack(planes)).view(3, size, size)  # three times as fast as turning (S, S, 3) round


def _resized(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC, box)
