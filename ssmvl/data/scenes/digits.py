"""The 1,797 handwritten digits of scikit-learn, and images of them on a 3 x 3 grid."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CELL, CELLS = 16, 3  # side of a cell in pixels, side of an image in cells
TRAIN_DIGITS = 1_397  # the other 400 are used only for testing


def digit_images(split: Literal["train", "test"]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the digits of one split: images uint8 (n, 16, 16), enlarged twofold, and labels (n,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    indices = order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]
    small = (data.images[indices] * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(image).resize((CELL, CELL), Image.Resampling.BICUBIC) for image in small]
    return np.stack([np.asarray(image) for image in large]), data.target[indices]


def draw(digits: dict[tuple[int, int], NDArray[np.uint8]]) -> Image.Image:
    """Draw digit images, by (row, column), onto a 48 x 48 RGB image, white on black."""
    canvas = np.zeros((CELLS * CELL, CELLS * CELL), np.uint8)
    for (row, column), digit in digits.items():
        canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = digit
    return Image.fromarray(canvas).convert("RGB")
