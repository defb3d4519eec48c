"""From an image a user has to the uint8 pixels an encoder takes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssmvl.interfaces import ImageSpec
from ssmvl.processing.image_decoding import ImageLike, read_image

__all__ = ["read_image", "to_pixels", "ImageLike"]

STRIP, LONGEST = 16, 4096  # longer sides, in shorter ones or in pixels, are reduced first for memory


def to_pixels(image: Image.Image, spec: ImageSpec) -> Tensor:
    """An RGB image -> uint8 (3, S, S), resized as `spec` says, bicubic.

    `resize-crop` and `letterbox` give the pixels that the papers' code feeds its encoders. To bound memory, images more
    than 16 times as long as wide are first cropped to their middle, and those longer than 4,096 pixels are reduced to
    that before they are letterboxed.

    Source: torchvision's Resize and CenterCrop; the letterbox of Prismatic (arXiv 2402.07865).
    """
    size = spec.size
    if spec.resize == "letterbox":
        square = _center_crop(_padded(image, spec.fill), size)
    elif spec.resize == "resize-crop":
        square = _center_crop(image, size)
    else:
        square = image.resize((size, size), Image.Resampling.BICUBIC)
    planes = [np.frombuffer(square.tobytes("raw", band), np.uint8) for band in "RGB"]
    return torch.from_numpy(np.stack(planes)).view(3, size, size)  # three times as fast as turning (S, S, 3) round


def _center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle S x S pixels of the image once its shorter side is resized to S."""
    (width, height), short = image.size, min(image.size)
    if max(width, height) > STRIP * short:
        image = image.crop(_middle(width, height, min(width, STRIP * short), min(height, STRIP * short)))
        width, height = image.size
    longer = int(size * max(width, height) / short)
    resized = (size, longer) if width <= height else (longer, size)
    whole = image.resize(resized, Image.Resampling.BICUBIC)
    return whole.crop(_middle(*resized, size, size))


def _middle(width: int, height: int, inner_width: int, inner_height: int) -> tuple[int, int, int, int]:
    left, top = round((width - inner_width) / 2), round((height - inner_height) / 2)
    return left, top, left + inner_width, top + inner_height


def _padded(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """An image with as much of the fill on both sides as makes it square, or one pixel short of that."""
    if (side := max(image.size)) > LONGEST:
        inner = [max(1, round(LONGEST * own / side)) for own in image.size]
        image = image.resize((inner[0], inner[1]), Image.Resampling.BICUBIC)
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    padded = Image.new("RGB", (image.width + 2 * left, image.height + 2 * top), fill)
    padded.paste(image, (left, top))
    return padded
