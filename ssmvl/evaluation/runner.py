"""Test questions, each asked three times: with its images, with black ones and with another record's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, NamedTuple

from PIL import Image
from tqdm.auto import tqdm

from ssmvl.errors import DataError
from ssmvl.generation.assistant import Assistant
from ssmvl.interfaces import Count, DatasetPart
from ssmvl.processing.processor import IMAGE, Processor
from ssmvl.processing.transforms import read_image


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The `evaluation:` of a recipe: its fields are the schema.

    Args:
        data: asked with its `test` split.
        batch: questions asked at once.
        max_new_tokens: length of an answer at the most.
    """

    data: DatasetPart
    batch: Count = 64
    max_new_tokens: Count = 16


class Answered(NamedTuple):
    """A test question, its true answer as the prompt teaches it, and the model's three."""

    type: str
    question: str
    truth: str
    seen: str
    blind: str
    swapped: str


def require_answerable(records: Sequence[Mapping[str, Any]], processor: Processor, max_new_tokens: int) -> str:
    """Check, before a model is trained, that each record can be asked and scored; its images are decoded.

    Returns:
        A note on answers longer than `max_new_tokens`, which can only count as wrong, or an empty string.

    Raises:
        DataError: the set is empty, or a record cannot be asked or scored; names the record.
    """
    if not records:
        raise DataError("the evaluation set is empty")
    lengths: list[int] = []
    for record in tqdm(records, desc="checking the evaluation set", unit=" records", disable=None, leave=False):
        try:
            talk = record["conversation"]
            if len(talk) % 2:
                raise DataError("its last question has no answer")
            if not isinstance(record["type"], str):
                raise DataError(f"its type must be a text; it is {record['type']!r}")
            processor.encode(talk, record["images"], train=True)
            for single in one_question_each([record]):  # which are asked without their answers
                processor.read(single["conversation"][:-1], single["images"])
                lengths.append(len(processor.answer_ids(single["conversation"])))
        except (ValueError, LookupError, TypeError) as error:  # a DataError is a ValueError
            name = record.get("id", "without an id")
            raise DataError(f"the evaluation set's sample {name!r} cannot be used: {error}") from error
    cut = sum(length > max_new_tokens for length in lengths)
    longer = f"{cut:,} of {len(lengths):,} answers are longer than max_new_tokens={max_new_tokens}"
    return f"{longer}; they can only count as wrong" if cut else ""


def one_question_each(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Split each record into one per answer, with the turns and images before it.

    `source` is the index of the original record.
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
    """Ask the last question of the chosen records, three times each.

    An answer is compared with what the assistant's prompt teaches of the true one; see `Processor.taught`.

    Args:
        assistant: the model.
        records: all test records, see `one_question_each`; the other images are those of the record half the list away
            (repeated where it has fewer), a single record's its own. Questions of one `source` are one record here.
        chosen: indices of `records`.
        options: batch size and length of the answers.
    """
    sources = [record.get("source", index) for index, record in enumerate(records)]
    latest = {sources[index]: index for index, record in enumerate(records) if record["images"]}
    pictured, half = list(latest), len(latest) // 2
    other_of = dict(zip(pictured, pictured[half:] + pictured[:half], strict=True))
    others = {index: latest[other_of[source]] for index, source in enumerate(sources) if source in other_of}
    answered: list[Answered] = []
    for start in range(0, len(chosen), options.batch):
        indices = chosen[start : start + options.batch]
        talks = [records[index]["conversation"] for index in indices]
        prompts = [talk[:-1] for talk in talks]
        own = [[read_image(image) for image in records[index]["images"]] for index in indices]
        black = [[Image.new("RGB", image.size) for image in images] for images in own]
        other = [
            [read_image(image) for image in islice(cycle(records[others[index]]["images"]), len(images))]
            if images
            else []
            for index, images in zip(indices, own, strict=True)
        ]
        answers = (
            assistant.generate(prompts, images, max_new_tokens=options.max_new_tokens) for images in (own, black, other)
        )
        types, questions = [records[i]["type"] for i in indices], [talk[-2]["content"] for talk in talks]
        answered += map(Answered, types, questions, map(assistant.processor.taught, talks), *answers)
    return answered
