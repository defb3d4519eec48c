"""Image transforms: a user's image -> the uint8 pixels that an encoder takes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssmvl.interfaces import ImageSpec
from ssmvl.processing.image_decoding import ImageLike, read_image

__all__ = ["read_image", "to_pixels", "ImageLike"]

STRIP, LONGEST = 16, 4096  # limits of the aspect ratio and of the longer side in pixels, to bound memory


def to_pixels(image: Image.Image, spec: ImageSpec) -> Tensor:
    """An RGB image -> uint8 (3, S, S), resized bicubically as `spec` states.

    `resize-crop` and `letterbox` reproduce the encoder inputs of the papers' code. To bound memory, `resize-crop` first
    center-crops images more than 16 times as long as wide, and `letterbox` first reduces images longer than 4,096
    pixels to that length.

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
    return torch.from_numpy(np.stack(planes)).view(3, size, size)  # three times as fast as permuting (S, S, 3)


def _center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to S, then crop the middle S x S pixels."""
    (width, height), short = image.size, min(image.size)
    if max(width, height) > STRIP * short:
        image = image.crop(_middle(width, height, min(width, STRIP * short), min(height, STRIP * short)))
        width, height = image.size
    longer = int(size * max(width, height) / short)
    resized = (size, longer) if width <= height else (longer, size)
    scaled = image.resize(resized, Image.Resampling.BICUBIC)
    return scaled.crop(_middle(*resized, size, size))


def _middle(width: int, height: int, inner_width: int, inner_height: int) -> tuple[int, int, int, int]:
    left, top = round((width - inner_width) / 2), round((height - inner_height) / 2)
    return left, top, left + inner_width, top + inner_height


def _padded(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """Pad an image equally on both sides with `fill`, so that it is square or one pixel short of it."""
    if (side := max(image.size)) > LONGEST:
        inner = [max(1, round(LONGEST * length / side)) for length in image.size]
        image = image.resize((inner[0], inner[1]), Image.Resampling.BICUBIC)
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    padded = Image.new("RGB", (image.width + 2 * left, image.height + 2 * top), fill)
    padded.paste(image, (left, top))
    return padded
