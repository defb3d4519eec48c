"""How often a model is right, by type of question."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from ssmvl.assistant import Assistant
from ssmvl.evaluation import Evaluation, Tally, results, table, tally


class BrightnessReader:
    """Answers with the image's brightness; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[tuple[int, int]], int]] = []

    def generate(self, prompts: Sequence[str], images: Sequence[Image.Image], *, max_new_tokens: int) -> list[str]:
        self.calls.append((list(prompts), [image.size for image in images], max_new_tokens))
        return [str(cast(tuple[int, ...], image.getpixel((0, 0)))[0]) for image in images]


def record(type_: str, brightness: int, answer: str, width: int = 2) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 3), (brightness,) * 3).save(buffer, "PNG")
    talk = [{"role": "user", "content": f"{type_}?"}, {"role": "assistant", "content": answer}]
    return {"id": "x", "type": type_, "conversation": talk, "images": [buffer.getvalue()]}


def options(batch: int = 2) -> Evaluation:
    return Evaluation(data=lambda split: Path(split), batch=batch, max_new_tokens=5)


def ask(records: Sequence[dict[str, Any]], batch: int = 2) -> tuple[dict[str, Tally], BrightnessReader]:
    reader = BrightnessReader()
    return tally(cast(Assistant, reader), records, options(batch)), reader


RECORDS = [
    record("row", 7, "7"),
    record("row", 7, "8"),
    record("column", 0, "0"),
    record("row", 9, "0"),
    record("row", 7, "7", width=5),
]


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_counts_by_type_whatever_the_batch(batch: int) -> None:
    counts, _ = ask(RECORDS, batch)
    assert counts == {
        "row": Tally(4, 2, 1, Counter({"7": 2, "8": 1, "0": 1})),
        "column": Tally(1, 1, 1, Counter({"0": 1})),
    }


def test_every_question_is_asked_with_its_image_and_with_a_black_one_of_its_size() -> None:
    _, reader = ask(RECORDS)
    sizes = [[(2, 3), (2, 3)], [(2, 3), (2, 3)], [(5, 3)]]
    prompts = [["row?", "row?"], ["column?", "row?"], ["row?"]]
    assert reader.calls == [(p, s, 5) for p, s in zip(prompts, sizes, strict=True) for _ in range(2)]


def test_answers_must_be_exact() -> None:
    counts, _ = ask([record("row", 7, answer) for answer in ("7", "7 ", "07", "77")])
    assert counts["row"].right == 1


def test_no_records() -> None:
    counts, reader = ask([])
    assert counts == {}
    assert reader.calls == []
    assert results([counts]) == {}


def test_results_are_shares() -> None:
    assert results([ask(RECORDS)[0]]) == {
        "column": {"accuracy": 1.0, "blind": 1.0, "commonest": 1.0, "n": 1},
        "row": {"accuracy": 0.5, "blind": 0.25, "commonest": 0.5, "n": 4},
    }


@pytest.mark.parametrize("cut", range(len(RECORDS) + 1))
def test_ranks_add_up(cut: int) -> None:
    parts = [ask(RECORDS[:cut])[0], ask(RECORDS[cut:])[0]]
    assert results(parts) == results([ask(RECORDS)[0]])


def test_commonest_is_taken_over_all_ranks() -> None:
    parts = [{"row": Tally(3, 0, 0, Counter(a=2, b=1))}, {"row": Tally(2, 0, 0, Counter(b=2))}]
    assert results(parts)["row"]["commonest"] == 3 / 5


def test_adding_leaves_the_parts_as_they_were() -> None:
    one, two = Tally(1, 1, 0, Counter(a=1)), Tally(1, 0, 1, Counter(a=1))
    assert one + two == Tally(2, 1, 1, Counter(a=2))
    assert (one, two) == (Tally(1, 1, 0, Counter(a=1)), Tally(1, 0, 1, Counter(a=1)))


def test_table() -> None:
    lines = table(results([ask(RECORDS)[0]])).splitlines()
    assert [line.split() for line in lines] == [
        ["question", "accuracy", "blind", "commonest", "n"],
        ["column", "100.0%", "100.0%", "100.0%", "1"],
        ["row", "50.0%", "25.0%", "50.0%", "4"],
    ]
    assert len({len(line) for line in lines}) == 1
