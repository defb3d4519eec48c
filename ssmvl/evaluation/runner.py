"""Ask each test question three times: with its images, with black images, and with another record's images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, NamedTuple

from PIL import Image

from ssmvl.errors import DataError
from ssmvl.generation.assistant import Assistant
from ssmvl.interfaces import Count, DatasetPart, Message
from ssmvl.processing.processor import IMAGE, Processor
from ssmvl.processing.transforms import read_image
from ssmvl.progress import progress


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The `evaluation:` section of a recipe. Its fields are the schema.

    Args:
        data: its `test` split is used.
        batch: questions per batch.
        max_new_tokens: maximum length of an answer.
    """

    data: DatasetPart
    batch: Count = 64
    max_new_tokens: Count = 16


class Answered(NamedTuple):
    """A test question, the training target of its answer (see `Processor.taught`), and the model's three answers."""

    type: str
    question: str
    truth: str
    seen: str
    blind: str
    swapped: str


def require_answerable(records: Sequence[Mapping[str, Any]], processor: Processor, max_new_tokens: int) -> str:
    """Check that every record can be asked and scored, which decodes its images. Called before training.

    Returns:
        A note on answers longer than `max_new_tokens`, which always count as wrong; empty if there are none.

    Raises:
        DataError: the set is empty, or a record cannot be asked or scored. Names the record.
    """
    if not records:
        raise DataError("the evaluation set is empty")
    lengths: list[int] = []
    for record in progress(records, desc="checking the evaluation set", unit=" records", leave=False):
        try:
            talk = record["conversation"]
            if len(talk) % 2:
                raise DataError("the last question has no answer")
            if not isinstance(record["type"], str):
                raise DataError(f"type must be a string, received {record['type']!r}")
            processor.encode(talk, record["images"], train=True)
            for single in one_question_each([record]):  # asked without the answer
                processor.read(single["conversation"][:-1], single["images"])
                lengths.append(len(processor.answer_ids(single["conversation"])))
        except (ValueError, LookupError, TypeError) as error:  # a DataError is a ValueError
            name = repr(record["id"]) if "id" in record else "without an id"
            raise DataError(f"the evaluation set's sample {name} cannot be used: {error}") from error
    cut = sum(length > max_new_tokens for length in lengths)
    longer = f"{cut:,} of {len(lengths):,} answers are longer than max_new_tokens={max_new_tokens}"
    return f"{longer}; they always count as wrong" if cut else ""


def one_question_each(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Split each record into one per answer, with all turns up to that answer and their images.

    The field `source` of a new record is the index of the original record.
    """
    single = []
    for source, record in enumerate(records):
        talk, images = record["conversation"], record["images"]
        marks = [sum(message["content"].count(IMAGE) for message in talk[:end:2]) for end in range(2, len(talk) + 1, 2)]
        for number, count in enumerate(marks, start=1):
            kept = images[:count] if marks[-1] else images
            single.append({**record, "conversation": talk[: 2 * number], "images": kept, "source": source})
    return single


def ask(
    assistant: Assistant, records: Sequence[Mapping[str, Any]], chosen: Sequence[int], options: Evaluation
) -> list[Answered]:
    """Ask the last question of each chosen record three times.

    Args:
        assistant: the model.
        records: all test records; see `one_question_each`. Swapped images come from the record half the list away,
            where only records with images count, and those of one `source` count as one. They are repeated if there
            are too few. If only one record has images, it keeps its own.
        chosen: indices of `records`.
        options: batch size and maximum length of the answers.
    """
    sources = [record.get("source", index) for index, record in enumerate(records)]
    latest = {sources[index]: index for index, record in enumerate(records) if record["images"]}
    pictured, half = list(latest), len(latest) // 2
    other_of = dict(zip(pictured, pictured[half:] + pictured[:half], strict=True))
    others = {index: latest[other_of[source]] for index, source in enumerate(sources) if source in other_of}
    answered: list[Answered] = []
    for start in progress(range(0, len(chosen), options.batch), desc="evaluating", unit=" batches", leave=False):
        indices = chosen[start : start + options.batch]
        talks = [records[index]["conversation"] for index in indices]
        prompts = [talk[:-1] for talk in talks]
        own = [[read_image(image) for image in records[index]["images"]] for index in indices]
        other = [
            [read_image(image) for image in islice(cycle(records[others[index]]["images"]), len(images))]
            if images
            else []
            for index, images in zip(indices, own, strict=True)
        ]
        limit = options.max_new_tokens
        seen = assistant.generate(prompts, own, max_new_tokens=limit)
        blind = _blind(assistant, prompts, own, limit)
        swapped = assistant.generate(prompts, other, max_new_tokens=limit)
        types, questions = [records[i]["type"] for i in indices], [talk[-2]["content"] for talk in talks]
        truths = map(assistant.processor.taught, talks)
        answered += map(Answered, types, questions, truths, seen, blind, swapped)
    return answered


def _blind(
    assistant: Assistant,
    prompts: Sequence[Sequence[Message]],
    images: Sequence[Sequence[Image.Image]],
    max_new_tokens: int,
) -> list[str]:
    """Ask with black images of the same sizes. Of equal prompts with images of equal sizes, one is asked."""
    keys = [json.dumps([prompt, [image.size for image in own]]) for prompt, own in zip(prompts, images, strict=True)]
    numbers = {key: number for number, key in enumerate(keys)}
    black = [[Image.new("RGB", image.size) for image in images[number]] for number in numbers.values()]
    asked = [prompts[number] for number in numbers.values()]
    answers = dict(zip(numbers, assistant.generate(asked, black, max_new_tokens=max_new_tokens), strict=True))
    return [answers[key] for key in keys]
