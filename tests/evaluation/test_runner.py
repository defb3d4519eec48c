"""Evaluation: questions asked of a model, and accuracy by type of question."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from rich.console import Console
from ssmvl_ml_mamba.prompts import ZephyrPrompt

from ssmvl.errors import DataError
from ssmvl.evaluation.results import Row, results, table
from ssmvl.evaluation.runner import Answered, Evaluation, ask, one_question_each, require_answerable
from ssmvl.generation.assistant import Assistant
from ssmvl.interfaces import ImageSpec, Prompt
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt, PlainPrompt, VicunaPrompt
from ssmvl.processing.tokenizers import byte_tokenizer


class BrightnessReader:
    """Answers with the brightness of the images, or "-" without one, and records its calls."""

    processor = Processor(byte_tokenizer(), MambaPrompt(), (ImageSpec(4),), tokens_per_image=1)

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], list[Any], int]] = []

    def generate(
        self, prompts: Sequence[Sequence[Any]], images: Sequence[list[Image.Image]], *, max_new_tokens: int
    ) -> list[str]:
        texts = [prompt[0]["content"] if len(prompt) == 1 else prompt for prompt in prompts]
        sizes = [[image.size for image in row] for row in images]
        self.calls.append((texts, [size[0] if len(size) == 1 else size for size in sizes], max_new_tokens))
        return ["+".join(str(cast(Any, image.getpixel((0, 0)))[0]) for image in row) or "-" for row in images]


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
    Answered("row", "row?", "7", "7", "0", "0"),  # the other image is from the record half the list away
    Answered("row", "row?", "0", "8", "0", "9"),
    Answered("column", "column?", "0", "0", "0", "7"),
    Answered("row", "row?", "7", "9", "0", "8"),
]


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_each_question_is_asked_with_its_own_a_black_and_another_image(batch: int) -> None:
    assert answers(RECORDS, batch)[0] == ANSWERED


def test_prompts_and_images_of_each_call() -> None:
    _, reader = answers(RECORDS)
    small, large = (2, 3), (5, 3)
    assert reader.calls == [
        (["row?", "row?"], [small, small], 5),
        (["row?"], [small], 5),  # two equal questions about black images of one size
        (["row?", "row?"], [small, large], 5),
        (["column?", "row?"], [small, large], 5),
        (["column?", "row?"], [small, large], 5),
        (["column?", "row?"], [small, small], 5),
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_several_ranks_ask_the_questions_of_one(world: int) -> None:
    parts = [answers(RECORDS, chosen=range(rank, len(RECORDS), world))[0] for rank in range(world)]
    assert [parts[index % world][index // world] for index in range(len(RECORDS))] == ANSWERED


def test_questions_without_an_image_are_always_asked_without_one() -> None:
    mixed = [record("text", None, "-"), record("row", 7, "7"), record("text", None, "x"), record("row", 8, "8")]
    answered, _ = answers(mixed)
    assert [(a.seen, a.blind, a.swapped) for a in answered] == [
        ("-", "-", "-"), ("7", "0", "8"), ("-", "-", "-"), ("8", "0", "7"),
    ]  # fmt: skip


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def test_all_images_of_a_question_are_shown() -> None:
    one, two, three = (record("row", brightness, "7", width=2 + brightness) for brightness in (1, 2, 3))
    pair = {**one, "images": one["images"] + two["images"], "conversation": talk("Both?", "1+2 \n")}
    answered, reader = answers([pair, three])
    assert [(a.truth, a.seen, a.blind, a.swapped) for a in answered] == [
        ("1+2", "1+2", "0+0", "3+3"),
        ("7", "3", "0", "1"),
    ]
    assert [sizes for _, sizes, _ in reader.calls] == [
        [[(3, 3), (4, 3)], (5, 3)], [[(3, 3), (4, 3)], (5, 3)], [[(5, 3), (5, 3)], (3, 3)],
    ]  # fmt: skip


def test_each_question_of_a_conversation_is_asked_after_the_previous_turns() -> None:
    first, second = record("row", 1, ""), record("row", 2, "")
    images = first["images"] + second["images"]
    marked = talk("<image> One?", "1", "<image> Two?", "1+2")
    single = one_question_each([{**first, "images": images, "conversation": marked}])
    assert [len(record["images"]) for record in single] == [1, 2]
    answered, reader = answers(single, batch=1)
    assert [(a.question, a.truth, a.seen) for a in answered] == [
        ("<image> One?", "1", "1"),
        ("<image> Two?", "1+2", "1+2"),
    ]
    assert reader.calls[0][0] == ["<image> One?"]
    assert reader.calls[3][0] == [marked[:3]]
    (plain,) = one_question_each([{**first, "images": images, "conversation": talk("Two?", "1+2")}])
    assert len(plain["images"]) == 2


def test_the_other_image_is_from_another_record_despite_many_questions() -> None:
    long = {**record("row", 9, ""), "conversation": talk(*"abcdefgh")}
    answered, _ = answers(one_question_each([record("row", 7, "7"), long]))
    assert [(a.seen, a.swapped) for a in answered] == [("7", "9"), *[("9", "7")] * 4]


@pytest.mark.parametrize("prompt", [MambaPrompt, PlainPrompt, VicunaPrompt, ZephyrPrompt])
@pytest.mark.parametrize("answer", ["7", " 7", "7\n", "two\nlines ", "", "the <|endoftext|>", " "])
def test_a_model_that_learned_every_answer_scores_all_of_them_correct(prompt: type[Prompt], answer: str) -> None:
    processor = Processor(byte_tokenizer(), prompt(), (ImageSpec(4),), tokens_per_image=1)
    question = {**record("row", 7, ""), "conversation": talk("Why? <image>", "so ", "And?", answer)}
    labels = processor.encode(question["conversation"], question["images"], train=True)["labels"].tolist()
    ids = [id_ for id_ in labels if id_ >= 0]
    ids.reverse()  # the last answer is between the last two end tokens
    ends = [i for i, id_ in enumerate(ids) if id_ == processor.end_id]
    learned = processor.decode(ids[ends[0] + 1 : ends[1]][::-1])

    class Learned(BrightnessReader):
        def generate(self, prompts: Sequence[Any], images: Sequence[Any], *, max_new_tokens: int) -> list[str]:
            return [learned] * len(prompts)

    reader = Learned()
    reader.processor = processor
    (answered,) = ask(cast(Assistant, reader), [question], [0], options())
    assert answered.truth == answered.seen


def test_unusable_records_are_named_in_advance() -> None:
    good, processor = record("row", 7, "seven"), BrightnessReader.processor
    assert require_answerable([good], processor, 5) == ""
    note = require_answerable([good, record("row", 7, "eleven")], processor, 5)
    assert note == "1 of 2 answers are longer than max_new_tokens=5; they always count as wrong"
    for wrong, why in (
        ({"conversation": talk("What?")}, "the last question has no answer"),
        ({"conversation": talk("<image><image>", "x")}, "2 <image> marks in the text, but 1 images"),
        ({"images": [b"damaged"]}, "cannot be decoded as an image"),
        ({"conversation": [{"role": "user"}] * 2}, "message 0 must be"),
        ({"conversation": []}, "the conversation is empty"),
        ({"type": None}, "type must be a string, received None"),
    ):
        with pytest.raises(DataError, match=f"(?s)sample 'x9' cannot be used: .*{why}"):
            require_answerable([good, {**good, "id": "x9", **wrong}], processor, 5)
    captions = replace(processor, prompt=PlainPrompt())  # which asks nothing without an image
    with pytest.raises(DataError, match="sample 'x' cannot be used: no text and no image"):
        require_answerable([record("row", None, "seven")], captions, 5)
    with pytest.raises(DataError, match="the evaluation set is empty"):
        require_answerable([], processor, 5)


def test_no_records() -> None:
    answered, reader = answers([])
    assert (answered, reader.calls, results(answered)) == ([], [], {})


def test_results_are_shares_by_type() -> None:
    rows = results(ANSWERED)
    assert list(rows) == ["column", "row"]
    assert {key: value for key, value in rows["row"].items() if key != "interval"} == {
        "accuracy": 1 / 3, "blind": 1 / 3, "swapped": 0.0, "commonest": 2 / 3, "n": 3,
    }  # fmt: skip
    assert {key: value for key, value in rows["column"].items() if key != "interval"} == {
        "accuracy": 1.0, "blind": 1.0, "swapped": 0.0, "commonest": 1.0, "n": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("correct", "low", "high"), [(95, 0.8882, 0.9785), (0, 0.0, 0.0370), (100, 0.9630, 1.0)])
def test_the_interval_is_wilsons(correct: int, low: float, high: float) -> None:
    group = [Answered("a", "?", "1", "1" if number < correct else "2", "", "") for number in range(100)]
    assert results(group)["a"]["interval"] == pytest.approx((low, high), abs=5e-5)


def test_answers_must_be_exact() -> None:
    group = [Answered("a", "?", "7", answer, "", "") for answer in ("7", "7 ", "07", "77")]
    assert results(group)["a"]["accuracy"] == 0.25


def test_table_shows_each_share_as_a_percentage() -> None:
    row = Row(accuracy=0.5, interval=(0.25, 0.75), blind=0.125, swapped=0.0, commonest=0.1, n=8)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table({"[/reading]": row}))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[-1] == ["[/reading]", "50.0%", "25.0%", "–", "75.0%", "12.5%", "0.0%", "10.0%", "8"]
    assert " ".join(lines[0]) == "question accuracy 95% interval blank image other image most common n"
