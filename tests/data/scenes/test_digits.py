"""The handwritten digits, and images drawn from them."""

from __future__ import annotations

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from ssmvl.data.scenes.digits import CELL, CELLS, digit_images, draw


def test_images_and_labels_equal_scikit_learns() -> None:
    data = load_digits()
    known = {}
    for small, label in zip((data.images * (255 / 16)).astype(np.uint8), data.target, strict=True):
        known[np.asarray(Image.fromarray(small).resize((CELL, CELL), Image.Resampling.BICUBIC)).tobytes()] = label
    total = 0
    for split in ("train", "test"):
        images, labels = digit_images(split)
        assert images.shape == (len(labels), CELL, CELL)
        assert images.dtype == np.uint8
        assert [known[image.tobytes()] for image in images] == labels.tolist()
        total += len(labels)
    assert total == len(data.target)


def test_no_digit_image_is_in_both_splits() -> None:
    train, test = ({image.tobytes() for image in digit_images(split)[0]} for split in ("train", "test"))
    assert len(train) > 1_300
    assert len(test) > 350
    assert not train & test


def test_draw_puts_every_digit_into_its_cell() -> None:
    one, two = np.full((CELL, CELL), 1, np.uint8), np.full((CELL, CELL), 2, np.uint8)
    pixels = np.asarray(draw({(0, 2): one, (1, 0): two}))
    assert pixels.shape == (CELLS * CELL, CELLS * CELL, 3)
    assert (pixels[:16, 32:] == 1).all()
    assert (pixels[16:32, :16] == 2).all()
    assert pixels.sum() == 3 * CELL * CELL * (1 + 2)
