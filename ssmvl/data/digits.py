"""The quickstart's data: one real handwritten digit on a 3 x 3 grid, and a question about it.

The 1,797 digits come with scikit-learn (`load_digits`), so nothing is downloaded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssmvl.data.shards import ensure_shards
from ssmvl.registry import Count, Seed

CELL, CELLS = 16, 3
VERSION = 2  # counted up when the records of one seed change
TRAIN_DIGITS = 1_397  # the other 400 appear in tests only
# Training asks for the digit twice as often as for its place, which is learned at once; tests ask each alike.
TURNS = {"train": ("digit", "row", "digit", "column"), "test": ("digit", "row", "column")}
QUESTIONS = {"digit": "Which digit is this?", "row": "Which row?", "column": "Which column?"}


def digit_images(split: Literal["train", "test"]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Handwritten digits of one split: images uint8 (n, 16, 16), enlarged twofold, and their labels (n,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]
    small = (data.images[chosen] * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(image).resize((CELL, CELL), Image.Resampling.BICUBIC) for image in small]
    return np.stack([np.asarray(image) for image in large]), data.target[chosen]


def draw(digits: dict[tuple[int, int], NDArray[np.uint8]]) -> Image.Image:
    """Digit images by (row, column) -> a 48 x 48 RGB picture, white on black."""
    canvas = np.zeros((CELLS * CELL, CELLS * CELL), np.uint8)
    for (row, column), digit in digits.items():
        canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = digit
    return Image.fromarray(canvas).convert("RGB")


def digits(
    split: str, *, train_size: Count = 12_000, test_size: Count = 3_000, seed: Seed = 0, folder: str = "data/digits"
) -> Path:
    """The folder of shards for one split, written when it is not there yet, and again when it is damaged.

    Args:
        split: `train` or `test`; no digit image is in both.
        train_size: questions to train on, half of them for the digit.
        test_size: questions to test with, a third of each type.
        seed: of the choice of digits and places.
        folder: where shards of all sizes and seeds lie, each in a folder of its own.
    """
    size = {"train": train_size, "test": test_size}[split]
    target = Path(folder) / f"{split}-{size}-seed{seed}-v{VERSION}"
    ensure_shards(target, lambda: _records(split, size, seed), size)
    return target


def _records(split: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    images, labels = digit_images("train" if split == "train" else "test")
    rng = np.random.default_rng([seed, split == "test"])
    for number in range(size):
        which, row, column = rng.integers(len(labels)), *rng.integers(CELLS, size=2)
        type_ = TURNS[split][number % len(TURNS[split])]
        answer = {"digit": str(labels[which]), "row": str(row + 1), "column": str(column + 1)}[type_]
        png = io.BytesIO()
        draw({(row, column): images[which]}).save(png, "PNG")
        conversation = [{"role": "user", "content": QUESTIONS[type_]}, {"role": "assistant", "content": answer}]
        yield {"id": f"{split}-{number}", "type": type_, "conversation": conversation, "images": [png.getvalue()]}
