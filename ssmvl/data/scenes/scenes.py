"""The quickstart's data: scenes of one to three handwritten digits, and the kinds of question the papers ask.

Each type of question stands for a benchmark: recognition for VQA, counting for TallyQA, presence for POPE, spatial for
VSR, reading for TextVQA. Rows and columns count from 1.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ssmvl.data.scenes.digits import CELLS, digit_images, draw
from ssmvl.data.shards import ensure_shards
from ssmvl.registry import Check, Count, Seed

VERSION = 1  # counted up when the records of one seed change
Scene = dict[tuple[int, int], int]  # the label of each digit, by (row, column) from 0, in reading order
Question = tuple[str, str]  # and its answer


def _recognition(scene: Scene, rng: np.random.Generator) -> Question:
    (row, column), label = list(scene.items())[rng.integers(len(scene))]
    asked = f"What is in row {row + 1}, column {column + 1}?" if len(scene) > 1 else "Which digit is it?"
    return asked, str(label)


def _counting(scene: Scene, rng: np.random.Generator) -> Question:
    return "How many digits?", str(len(scene))


def _presence(scene: Scene, rng: np.random.Generator) -> Question:
    there = bool(rng.integers(2))
    label = rng.choice([label for label in range(10) if (label in scene.values()) is there])
    return f"Is there a {label}?", "Yes" if there else "No"


def _spatial(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A statement about two digits of one row or one column, where it is plainly true or false; no digit twice."""
    if len(set(scene.values())) < max(2, len(scene)):
        return None
    one, other = (list(scene)[at] for at in rng.permutation(len(scene))[:2])
    axis, true = int(one[0] == other[0]), bool(rng.integers(2))
    if one[1 - axis] != other[1 - axis]:
        return None
    before, after = (("above", "below"), ("left of", "right of"))[axis]
    relation = before if (one[axis] < other[axis]) is true else after
    return f"The {scene[one]} is {relation} the {scene[other]}.", str(true)


def _reading(scene: Scene, rng: np.random.Generator) -> Question:
    return "Read the digits.", "".join(map(str, scene.values()))


QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "recognition": _recognition,
    "counting": _counting,
    "presence": _presence,
    "spatial": _spatial,
    "reading": _reading,
}
Types = Annotated[
    list[str], Check(f"a list of {', '.join(QUESTIONS)}", lambda types: types and QUESTIONS.keys() >= set(types))
]


def digit_scenes(
    split: str,
    *,
    types: Types | None = None,
    train_size: Count = 32_000,
    test_size: Count = 5_000,
    seed: Seed = 0,
    folder: str = "data/digit_scenes",
) -> Path:
    """The folder of shards for one split, written when it is not there yet, and again when it is damaged.

    Args:
        split: `train` or `test`; no digit image is in both.
        types: of question, asked in turn; one that is listed twice is asked twice as often. All five if None.
        train_size: questions to train on, each about a scene of its own.
        test_size: questions to test with.
        seed: of scenes and questions.
        folder: where shards of all types, sizes and seeds lie, each in a folder of its own.
    """
    size = {"train": train_size, "test": test_size}[split]
    types = list(QUESTIONS) if types is None else types
    asked = "-".join(type_[:3] for type_ in types)
    target = Path(folder) / f"{split}-{size}-seed{seed}-{asked}-v{VERSION}"
    ensure_shards(target, lambda: _records(split, types, size, seed), size)
    return target


def _records(split: str, types: Sequence[str], size: int, seed: int) -> Iterator[dict[str, Any]]:
    images, labels = digit_images("train" if split == "train" else "test")
    rng = np.random.default_rng([seed, split == "test"])
    for number in range(size):
        type_, found = types[number % len(types)], None
        digits: dict[tuple[int, int], int] = {}
        while found is None:  # not every scene has what a question is about
            cells = rng.choice(CELLS * CELLS, size=rng.integers(1, 4), replace=False)
            digits = {divmod(int(cell), CELLS): int(rng.integers(len(labels))) for cell in sorted(cells)}
            found = QUESTIONS[type_]({cell: int(labels[which]) for cell, which in digits.items()}, rng)
        png = io.BytesIO()
        draw({cell: images[which] for cell, which in digits.items()}).save(png, "PNG", compress_level=1)
        conversation = [{"role": "user", "content": found[0]}, {"role": "assistant", "content": found[1]}]
        yield {"id": f"{split}-{number}", "type": type_, "conversation": conversation, "images": [png.getvalue()]}
