"""From an image a user has to the uint8 pixels an encoder takes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssmvl.errors import DataError
from ssmvl.interfaces import ImageSpec
from ssmvl.processing.image_decoding import decoded, open_image, reason

__all__ = ["read_image", "to_pixels", "ImageLike"]

MAX_PIXELS = 100_000_000  # a decompression bomb is refused before it is decoded

ImageLike = str | Path | bytes | Image.Image


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
            with open_image(image) as opened:
                return _to_rgb(opened, what, largest)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{what}: no such image file") from error
    except Exception as error:  # PIL's decoders may raise anything on damaged bytes
        raise DataError(f"{what}: cannot be decoded as an image ({type(error).__name__}: {reason(error)})") from error


def _to_rgb(image: Image.Image, what: str, largest: int | None = None) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{what}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are allowed")
    if largest is not None:
        image.draft(None, (2 * largest, 2 * largest))  # JPEG only; less than twice would show in the resized image
    image = decoded(image, what)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


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
