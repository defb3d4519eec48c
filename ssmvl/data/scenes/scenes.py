"""The quickstart's dataset: scenes of one to three handwritten digits, with questions like those in the papers.

Each type of question is modeled on a benchmark: recognition on VQA, counting on TallyQA, presence on POPE, spatial on
VSR, reading on TextVQA. Questions number rows and columns from 1.
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

VERSION = 1  # increment when the records of a seed change
Scene = dict[tuple[int, int], int]  # label of each digit by (row, column) from 0, in reading order
Question = tuple[str, str]  # question and answer


def _recognition(scene: Scene, rng: np.random.Generator) -> Question:
    (row, column), label = list(scene.items())[rng.integers(len(scene))]
    question = f"What is in row {row + 1}, column {column + 1}?" if len(scene) > 1 else "Which digit is it?"
    return question, str(label)


def _counting(scene: Scene, rng: np.random.Generator) -> Question:
    return "How many digits?", str(len(scene))


def _presence(scene: Scene, rng: np.random.Generator) -> Question:
    present = bool(rng.integers(2))
    label = rng.choice([label for label in range(10) if (label in scene.values()) is present])
    return f"Is there a {label}?", "Yes" if present else "No"


def _spatial(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Make a statement about two digits in one row or column, so that it is clearly true or false.

    Returns None if the chosen digits share neither, or if the scene has fewer than two digits or a repeated one.
    """
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
    """Return the directory of one split's shards. They are written if missing, and rewritten if damaged.

    Args:
        split: `train` or `test`; no digit image is in both.
        types: types of question, used in turn; a type listed twice is used twice as often. None means all five.
        train_size: number of training questions, each about a different scene.
        test_size: number of test questions.
        seed: seed of scenes and questions.
        folder: parent directory, with one subdirectory for each combination of types, size and seed.
    """
    size = {"train": train_size, "test": test_size}[split]
    types = list(QUESTIONS) if types is None else types
    abbreviated = "-".join(type_[:3] for type_ in types)
    target = Path(folder) / f"{split}-{size}-seed{seed}-{abbreviated}-v{VERSION}"
    ensure_shards(target, lambda: _records(split, types, size, seed), size)
    return target


def _records(split: str, types: Sequence[str], size: int, seed: int) -> Iterator[dict[str, Any]]:
    images, labels = digit_images("train" if split == "train" else "test")
    rng = np.random.default_rng([seed, split == "test"])
    for number in range(size):
        type_, question = types[number % len(types)], None
        digits: dict[tuple[int, int], int] = {}
        while question is None:  # not every scene suits every type of question
            cells = rng.choice(CELLS * CELLS, size=rng.integers(1, 4), replace=False)
            digits = {divmod(int(cell), CELLS): int(rng.integers(len(labels))) for cell in sorted(cells)}
            question = QUESTIONS[type_]({cell: int(labels[which]) for cell, which in digits.items()}, rng)
        png = io.BytesIO()
        draw({cell: images[which] for cell, which in digits.items()}).save(png, "PNG", compress_level=1)
        conversation = [{"role": "user", "content": question[0]}, {"role": "assistant", "content": question[1]}]
        yield {"id": f"{split}-{number}", "type": type_, "conversation": conversation, "images": [png.getvalue()]}
