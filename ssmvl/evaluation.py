"""Whether a model sees: how often it is right by type of question, with its image, a blank one and another's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from PIL import Image
from rich.table import Table
from rich.text import Text

from ssmvl.assistant import Assistant
from ssmvl.interfaces import Count, DatasetPart
from ssmvl.vision.transforms import read_image


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


class Row(TypedDict):
    """What is known about one type of question; shares in 0…1."""

    accuracy: float
    interval: tuple[float, float]  # of the accuracy, 95 % (Wilson)
    blind: float  # accuracy with a black image
    swapped: float  # accuracy with another record's image
    commonest: float  # share of the commonest true answer
    n: int


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


def results(answered: Iterable[Answered]) -> dict[str, Row]:
    """One row for each type of question, sorted; an answer is right if it is exact."""
    from scipy.stats import binomtest

    types: dict[str, list[Answered]] = {}
    for one in answered:
        types.setdefault(one.type, []).append(one)
    found = {}
    for type_, group in sorted(types.items()):
        n, right = len(group), sum(one.seen == one.truth for one in group)
        low, high = binomtest(right, n).proportion_ci(method="wilson")
        found[type_] = Row(
            accuracy=right / n,
            interval=(float(low), float(high)),
            blind=sum(one.blind == one.truth for one in group) / n,
            swapped=sum(one.swapped == one.truth for one in group) / n,
            commonest=max(Counter(one.truth for one in group).values()) / n,
            n=n,
        )
    return found


def table(found: Mapping[str, Row]) -> Table:
    """`results` for the screen."""
    shown = Table("question", box=None, pad_edge=False)
    for title in ("accuracy", "95 % interval", "blank image", "other image", "commonest", "n"):
        shown.add_column(title, justify="right")
    for type_, row in found.items():
        low, high = row["interval"]
        shares = (f"{share:.1%}" for share in (row["blind"], row["swapped"], row["commonest"]))
        shown.add_row(Text(type_), f"{row['accuracy']:.1%}", f"{low:.1%} – {high:.1%}", *shares, str(row["n"]))
    return shown
