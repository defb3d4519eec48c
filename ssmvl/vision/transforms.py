"""From an image a user has to the uint8 pixels an encoder takes."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ssmvl.errors import DataError
from ssmvl.interfaces import ImageSpec

MAX_PIXELS = 100_000_000  # a decompression bomb is refused before it is decoded

ImageLike = str | Path | bytes | Image.Image


def read_image(image: ImageLike) -> Image.Image:
    """Decode a file, bytes or a PIL image to RGB.

    Raises:
        DataError: it cannot be found or decoded, or has more than `MAX_PIXELS` pixels.
    """
    what = "image bytes" if isinstance(image, bytes) else str(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            if not isinstance(image, ImageLike):
                raise DataError(f"a {type(image).__name__} is no image; give a path, encoded bytes or a PIL image")
            if isinstance(image, Image.Image):
                return _to_rgb(image, what)
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return _to_rgb(opened, what)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{what}: no such image file") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{what}: cannot be decoded as an image ({error})") from error


def _to_rgb(image: Image.Image, what: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{what}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are allowed")
    if image.mode.startswith("I;16"):  # PIL would clip 16 bits to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    return image.convert("RGB")


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
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _resized(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC, box)
