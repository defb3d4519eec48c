"""The quickstart's dataset: every answer is derived from the image, independently of the code that made it."""

from __future__ import annotations

import functools
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssmvl.data.scenes.digits import CELL, CELLS, digit_images
from ssmvl.data.scenes.scenes import QUESTIONS, digit_scenes
from ssmvl.data.streams import read_records

SIZE = 1_500
Scene = dict[tuple[int, int], int]
Records = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scenes")


def written(
    folder: Path, split: str = "train", seed: int = 0, size: int = 16, types: list[str] | None = None
) -> list[dict[str, Any]]:
    return read_records(
        digit_scenes(split, types=types, train_size=size, test_size=size, seed=seed, folder=str(folder))
    )


@pytest.fixture(scope="module")
def records(folder: Path) -> Records:
    return {split: written(folder, split, size=SIZE) for split in ("train", "test")}


@functools.cache
def known_images(split: str) -> dict[bytes, int]:
    images, labels = digit_images("train" if split == "train" else "test")
    return {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}


def read_scene(record: dict[str, Any], split: str) -> Scene:
    """Read the digits in a record's image, by (row, column) from 1. Each must be a digit image of the split."""
    (image,) = record["images"]
    pixels = np.asarray(Image.open(io.BytesIO(image)))
    assert pixels.shape == (CELLS * CELL, CELLS * CELL, 3)
    cells = pixels[:, :, 0].reshape(CELLS, CELL, CELLS, CELL).swapaxes(1, 2)
    nonempty = np.argwhere(cells.any((2, 3)))
    return {(int(r) + 1, int(c) + 1): known_images(split)[cells[r, c].tobytes()] for r, c in nonempty}


def true_answer(question: str, scene: Scene) -> str:
    """Return the answer to a question. Both digits of a spatial statement must be in the scene exactly once."""
    reading = [scene[cell] for cell in sorted(scene)]
    if question == "How many digits?":
        return str(len(scene))
    if question == "Read the digits.":
        return "".join(map(str, reading))
    if question == "Which digit is it?":
        (only,) = reading
        return str(only)
    if match := re.fullmatch(r"What is in row (\d), column (\d)\?", question):
        return str(scene[int(match[1]), int(match[2])])
    if match := re.fullmatch(r"Is there a (\d)\?", question):
        return "Yes" if int(match[1]) in reading else "No"
    match = re.fullmatch(r"The (\d) is (left of|right of|above|below) the (\d)\.", question)
    assert match, question
    (one,), (other,) = ([p for p, label in scene.items() if label == int(match[n])] for n in (1, 3))
    (row, column), (other_row, other_column) = one, other
    assert (row == other_row) != (column == other_column), "neither one row nor one column"
    truth = {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }
    return str(truth[match[2]])


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_matches_the_image(records: Records, split: str) -> None:
    for record in records[split][:600]:
        question, answer = record["conversation"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        scene = read_scene(record, split)
        assert 1 <= len(scene) <= 3
        assert answer["content"] == true_answer(question["content"], scene)


def test_each_type_has_its_own_questions(records: Records) -> None:
    starts = {
        "recognition": ("What is", "Which"),
        "counting": ("How many",),
        "presence": ("Is there",),
        "spatial": ("The",),
        "reading": ("Read",),
    }
    for record in records["train"] + records["test"]:
        assert record["conversation"][0]["content"].startswith(starts[record["type"]])


@pytest.mark.parametrize("split", ["train", "test"])
def test_types_are_balanced_and_ids_are_unique(records: Records, split: str) -> None:
    assert Counter(record["type"] for record in records[split]) == dict.fromkeys(QUESTIONS, SIZE // 5)
    assert [record["id"] for record in records[split]] == [f"{split}-{i}" for i in range(SIZE)]


def test_types_are_used_in_turn_as_often_as_they_are_listed(tmp_path: Path) -> None:
    records = written(tmp_path, size=7, types=["spatial", "reading", "spatial"])
    assert [record["type"] for record in records] == ["spatial", "reading", "spatial"] * 2 + ["spatial"]


@pytest.mark.parametrize("type_", ["presence", "spatial"])
def test_both_answers_are_balanced(records: Records, type_: str) -> None:
    answers = Counter(r["conversation"][1]["content"] for s in records.values() for r in s if r["type"] == type_)
    assert len(answers) == 2
    assert 0.42 < max(answers.values()) / sum(answers.values()) < 0.58


def test_relations_are_balanced_and_none_reveals_the_answer(records: Records) -> None:
    conversations = [r["conversation"] for s in records.values() for r in s if r["type"] == "spatial"]
    words = Counter((re.findall("left|right|above|below", q["content"])[0], a["content"]) for q, a in conversations)
    assert len(words) == 8
    assert max(words.values()) < 2 * min(words.values())


def test_numbers_of_digits_are_balanced(records: Records) -> None:
    counts = Counter(r["conversation"][1]["content"] for s in records.values() for r in s if r["type"] == "counting")
    assert set(counts) == {"1", "2", "3"}
    assert max(counts.values()) < 0.42 * sum(counts.values())


def without_ids(records: list[dict[str, Any]]) -> list[Any]:
    return [(record["conversation"], record["images"]) for record in records]


def test_the_same_seed_gives_the_same_records(folder: Path, tmp_path: Path) -> None:
    assert written(folder) == written(tmp_path)


def test_different_seeds_and_splits_give_different_records(folder: Path) -> None:
    first = without_ids(written(folder))
    for other in (written(folder, seed=1), written(folder, "test")):
        assert not any(record in first for record in without_ids(other))


def test_types_sizes_seeds_and_splits_have_separate_directories(folder: Path) -> None:
    paths = {
        digit_scenes(split, types=types, train_size=size, test_size=size, seed=seed, folder=str(folder))
        for split in ("train", "test")
        for types in (None, ["reading"])
        for size in (3, 6)
        for seed in (0, 1)
    }
    assert len(paths) == 16
    assert all(path.parent == folder and path.is_dir() for path in paths)
