"""How often a model is right, by type of question."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from rich.console import Console

from ssmvl.evaluation.results import Row, results, table
from ssmvl.evaluation.runner import Answered, Evaluation, ask
from ssmvl.generation.assistant import Assistant


class BrightnessReader:
    """Answers with the image's brightness, "-" without one; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[tuple[int, int] | None], int]] = []

    def generate(
        self, prompts: Sequence[str], images: Sequence[Image.Image | None], *, max_new_tokens: int
    ) -> list[str]:
        self.calls.append((list(prompts), [image and image.size for image in images], max_new_tokens))
        return [str(cast(tuple[int, ...], image.getpixel((0, 0)))[0]) if image else "-" for image in images]


def record(type_: str, brightness: int | None, answer: str, width: int = 2) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 3), (brightness or 0,) * 3).save(buffer, "PNG")
    talk = [{"role": "user", "content": f"{type_}?"}, {"role": "assistant", "content": answer}]
    return {"id": "x", "type": type_, "conversation": talk, "images": [] if brightness is None else [buffer.getvalue()]}


def options(batch: int = 2) -> Evaluation:
    return Evaluation(data=lambda split: Path(split), batch=batch, max_new_tokens=5)


def answers(
    records: Sequence[dict[str, Any]], batch: int = 2, chosen: Sequence[int] | None = None
) -> tuple[list[Answered], BrightnessReader]:
    reader = BrightnessReader()
    chosen = range(len(records)) if chosen is None else chosen
    return ask(cast(Assistant, reader), records, chosen, options(batch)), reader


RECORDS = [
    record("row", 7, "7"),
    record("row", 8, "0"),
    record("column", 0, "0"),
    record("row", 9, "7", width=5),
]
ANSWERED = [
    Answered("row", "row?", "7", "7", "0", "0"),  # the other image is that of the record half the list away
    Answered("row", "row?", "0", "8", "0", "9"),
    Answered("column", "column?", "0", "0", "0", "7"),
    Answered("row", "row?", "7", "9", "0", "8"),
]


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_each_question_is_asked_with_its_image_a_black_one_and_another_records(batch: int) -> None:
    assert answers(RECORDS, batch)[0] == ANSWERED


def test_what_reaches_the_model() -> None:
    _, reader = answers(RECORDS)
    first, second = [(2, 3), (2, 3)], [(2, 3), (5, 3)]
    assert reader.calls == [
        *((["row?", "row?"], sizes, 5) for sizes in (first, first, second)),
        *((["column?", "row?"], sizes, 5) for sizes in (second, second, first)),
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_ask_the_same_as_one(world: int) -> None:
    parts = [answers(RECORDS, chosen=range(rank, len(RECORDS), world))[0] for rank in range(world)]
    assert [parts[place % world][place // world] for place in range(len(RECORDS))] == ANSWERED


def test_questions_without_an_image_are_asked_without_one_each_time() -> None:
    mixed = [record("text", None, "-"), record("row", 7, "7"), record("text", None, "x"), record("row", 8, "8")]
    found, _ = answers(mixed)
    assert [(one.seen, one.blind, one.swapped) for one in found] == [
        ("-", "-", "-"), ("7", "0", "8"), ("-", "-", "-"), ("8", "0", "7"),
    ]  # fmt: skip


def test_no_records() -> None:
    found, reader = answers([])
    assert (found, reader.calls, results(found)) == ([], [], {})


def test_results_are_shares_by_type() -> None:
    found = results(ANSWERED)
    assert list(found) == ["column", "row"]
    assert {key: value for key, value in found["row"].items() if key != "interval"} == {
        "accuracy": 1 / 3, "blind": 1 / 3, "swapped": 0.0, "commonest": 2 / 3, "n": 3,
    }  # fmt: skip
    assert {key: value for key, value in found["column"].items() if key != "interval"} == {
        "accuracy": 1.0, "blind": 1.0, "swapped": 0.0, "commonest": 1.0, "n": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("right", "low", "high"), [(95, 0.8882, 0.9785), (0, 0.0, 0.0370), (100, 0.9630, 1.0)])
def test_interval_is_wilsons(right: int, low: float, high: float) -> None:
    group = [Answered("a", "?", "1", "1" if number < right else "2", "", "") for number in range(100)]
    assert results(group)["a"]["interval"] == pytest.approx((low, high), abs=5e-5)


def test_answers_must_be_exact() -> None:
    group = [Answered("a", "?", "7", said, "", "") for said in ("7", "7 ", "07", "77")]
    assert results(group)["a"]["accuracy"] == 0.25


def test_table_shows_each_share_as_a_percentage() -> None:
    row = Row(accuracy=0.5, interval=(0.25, 0.75), blind=0.125, swapped=0.0, commonest=0.1, n=8)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table({"[/reading]": row}))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[-1] == ["[/reading]", "50.0%", "25.0%", "–", "75.0%", "12.5%", "0.0%", "10.0%", "8"]
    assert " ".join(lines[0]) == "question accuracy 95 % interval blank image other image commonest n"
