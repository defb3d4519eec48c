"""The quickstart's data."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ssmvl.data.digits import CELL, CELLS, QUESTIONS, digit_images, digits, draw
from ssmvl.data.streams import read_records

SIZE = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


def written(folder: Path, split: str = "train", seed: int = 0) -> list[dict[str, Any]]:
    return read_records(digits(split, train_size=SIZE, test_size=SIZE, seed=seed, folder=str(folder)))


def without_names(records: list[dict[str, Any]]) -> list[Any]:
    return [(record["conversation"], record["images"]) for record in records]


def digit_in(picture: bytes) -> tuple[int, int, np.ndarray]:
    """Row, column and pixels of the only digit in a picture."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    assert pixels.shape == (CELLS * CELL, CELLS * CELL, 3)
    assert (pixels == pixels[:, :, :1]).all()
    cells = pixels[:, :, 0].reshape(CELLS, CELL, CELLS, CELL).swapaxes(1, 2)
    ((row, column),) = np.argwhere(cells.any((2, 3)))
    return int(row), int(column), cells[row, column]


def test_images_are_those_of_scikit_learn_with_their_labels() -> None:
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
    assert pixels.shape == (48, 48, 3)
    assert (pixels[:16, 32:] == 1).all()
    assert (pixels[16:32, :16] == 2).all()
    assert pixels.sum() == 3 * CELL * CELL * (1 + 2)


@pytest.mark.parametrize("split", ["train", "test"])
def test_picture_shows_what_the_answer_says(folder: Path, split: str) -> None:
    images, labels = digit_images("train" if split == "train" else "test")
    known = {image.tobytes(): str(label) for image, label in zip(images, labels, strict=True)}
    records = written(folder, split)
    assert len(records) == SIZE
    for record in records:
        row, column, pixels = digit_in(*record["images"])
        answers = {"digit": known[pixels.tobytes()], "row": str(row + 1), "column": str(column + 1)}
        assert record["conversation"] == [
            {"role": "user", "content": QUESTIONS[record["type"]]},
            {"role": "assistant", "content": answers[record["type"]]},
        ]


@pytest.mark.parametrize(("split", "row_and_column"), [("train", 3), ("test", 4)])
def test_types_in_their_shares_and_a_name_for_each(folder: Path, split: str, row_and_column: int) -> None:
    records = written(folder, split)
    counts = Counter(record["type"] for record in records)
    assert counts == {"digit": SIZE - 2 * row_and_column, "row": row_and_column, "column": row_and_column}
    assert [record["id"] for record in records] == [f"{split}-{i}" for i in range(SIZE)]


def test_same_seed_same_records(folder: Path, tmp_path: Path) -> None:
    assert written(folder) == written(tmp_path)


def test_another_seed_and_another_split_are_other_records(folder: Path) -> None:
    first = without_names(written(folder))
    for other in (written(folder, seed=1), written(folder, "test")):
        assert not any(record in first for record in without_names(other))


def test_sizes_seeds_and_splits_lie_apart(folder: Path) -> None:
    made = {
        digits(split, train_size=size, test_size=size, seed=seed, folder=str(folder))
        for split in ("train", "test")
        for size in (3, 6)
        for seed in (0, 1)
    }
    assert len(made) == 8
    assert all(path.parent == folder and path.is_dir() for path in made)
