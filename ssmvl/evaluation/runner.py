"""Test questions, each asked three times: with its image, with a blank one and with another record's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from ssmvl.generation.assistant import Assistant
from ssmvl.interfaces import Count, DatasetPart
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
    """A test question, its true answer, and the model's: with its image, a black one, and another record's."""

    type: str
    question: str
    truth: str
    seen: str
    blind: str
    swapped: str


def ask(
    assistant: Assistant, records: Sequence[Mapping[str, Any]], chosen: Sequence[int], options: Evaluation
) -> list[Answered]:
    """Ask the first question of the chosen records, three times each.

    Args:
        assistant: the model.
        records: all test records; the other image is that of the record half the list away, a single record's its own.
        chosen: places in `records`.
        options: how.
    """
    pictured = [place for place, record in enumerate(records) if record["images"]]
    half = len(pictured) // 2
    others = dict(zip(pictured, pictured[half:] + pictured[:half], strict=True))
    answered: list[Answered] = []
    for start in range(0, len(chosen), options.batch):
        places = chosen[start : start + options.batch]
        questions, truths = zip(*([m["content"] for m in records[p]["conversation"][:2]] for p in places), strict=True)
        own = [read_image(records[p]["images"][0]) if p in others else None for p in places]
        black = [image and Image.new("RGB", image.size) for image in own]
        other = [read_image(records[others[p]]["images"][0]) if p in others else None for p in places]
        said = (assistant.generate(questions, i, max_new_tokens=options.max_new_tokens) for i in (own, black, other))
        answered += map(Answered, (records[p]["type"] for p in places), questions, truths, *said)
    return answered
