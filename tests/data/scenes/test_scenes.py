"""The quickstart's data: every answer is read again off the picture, by other means than it was made with."""

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


def seen(record: dict[str, Any], split: str) -> Scene:
    """The label of each digit in a record's picture, by (row, column) from 1; each must be an image of the split."""
    (picture,) = record["images"]
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    assert pixels.shape == (CELLS * CELL, CELLS * CELL, 3)
    cells = pixels[:, :, 0].reshape(CELLS, CELL, CELLS, CELL).swapaxes(1, 2)
    places = np.argwhere(cells.any((2, 3)))
    return {(int(r) + 1, int(c) + 1): known_images(split)[cells[r, c].tobytes()] for r, c in places}


def true_answer(question: str, scene: Scene) -> str:
    """The answer, from the words of the question; named digits must be in the scene once where that matters."""
    reading = [scene[place] for place in sorted(scene)]
    if question == "How many digits?":
        return str(len(scene))
    if question == "Read the digits.":
        return "".join(map(str, reading))
    if question == "Which digit is it?":
        (only,) = reading
        return str(only)
    if found := re.fullmatch(r"What is in row (\d), column (\d)\?", question):
        return str(scene[int(found[1]), int(found[2])])
    if found := re.fullmatch(r"Is there a (\d)\?", question):
        return "Yes" if int(found[1]) in reading else "No"
    found = re.fullmatch(r"The (\d) is (left of|right of|above|below) the (\d)\.", question)
    assert found, question
    (one,), (other,) = ([p for p, label in scene.items() if label == int(found[n])] for n in (1, 3))
    (row, column), (other_row, other_column) = one, other
    assert (row == other_row) != (column == other_column), "neither one row nor one column"
    truth = {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }
    return str(truth[found[2]])


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_what_the_picture_shows(records: Records, split: str) -> None:
    for record in records[split][:600]:
        question, answer = record["conversation"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        scene = seen(record, split)
        assert 1 <= len(scene) <= 3
        assert answer["content"] == true_answer(question["content"], scene)


def test_each_type_asks_its_own_questions(records: Records) -> None:
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
def test_each_type_alike_and_a_name_for_each_record(records: Records, split: str) -> None:
    assert Counter(record["type"] for record in records[split]) == dict.fromkeys(QUESTIONS, SIZE // 5)
    assert [record["id"] for record in records[split]] == [f"{split}-{i}" for i in range(SIZE)]


def test_types_are_asked_in_turn_as_often_as_they_are_listed(tmp_path: Path) -> None:
    found = written(tmp_path, size=7, types=["spatial", "reading", "spatial"])
    assert [record["type"] for record in found] == ["spatial", "reading", "spatial"] * 2 + ["spatial"]


@pytest.mark.parametrize("type_", ["presence", "spatial"])
def test_yes_and_no_are_balanced(records: Records, type_: str) -> None:
    answers = Counter(r["conversation"][1]["content"] for s in records.values() for r in s if r["type"] == type_)
    assert len(answers) == 2
    assert 0.42 < max(answers.values()) / sum(answers.values()) < 0.58


def test_relations_are_balanced_and_none_tells_the_answer(records: Records) -> None:
    asked = [r["conversation"] for s in records.values() for r in s if r["type"] == "spatial"]
    words = Counter((re.findall("left|right|above|below", q["content"])[0], a["content"]) for q, a in asked)
    assert len(words) == 8
    assert max(words.values()) < 2 * min(words.values())


def test_one_to_three_digits_as_often(records: Records) -> None:
    counts = Counter(r["conversation"][1]["content"] for s in records.values() for r in s if r["type"] == "counting")
    assert set(counts) == {"1", "2", "3"}
    assert max(counts.values()) < 0.42 * sum(counts.values())


def without_names(found: list[dict[str, Any]]) -> list[Any]:
    return [(record["conversation"], record["images"]) for record in found]


def test_same_seed_same_records(folder: Path, tmp_path: Path) -> None:
    assert written(folder) == written(tmp_path)


def test_another_seed_and_another_split_are_other_records(folder: Path) -> None:
    first = without_names(written(folder))
    for other in (written(folder, seed=1), written(folder, "test")):
        assert not any(record in first for record in without_names(other))


def test_types_sizes_seeds_and_splits_lie_apart(folder: Path) -> None:
    made = {
        digit_scenes(split, types=types, train_size=size, test_size=size, seed=seed, folder=str(folder))
        for split in ("train", "test")
        for types in (None, ["reading"])
        for size in (3, 6)
        for seed in (0, 1)
    }
    assert len(made) == 16
    assert all(path.parent == folder and path.is_dir() for path in made)
