"""How often a model is right, by type of question, with its eyes open and with the image blanked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

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


@dataclass
class Tally:
    """Counts for one type of question."""

    n: int = 0
    right: int = 0
    blind: int = 0
    answers: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.n + other.n, self.right + other.right, self.blind + other.blind, self.answers + other.answers)


def tally(assistant: Assistant, records: Sequence[dict[str, Any]], options: Evaluation) -> dict[str, Tally]:
    """Ask every record's first question, with its image and with a black one; count exact answers by type."""
    counts: dict[str, Tally] = {}
    for start in range(0, len(records), options.batch):
        batch = records[start : start + options.batch]
        prompts = [record["conversation"][0]["content"] for record in batch]
        images = [read_image(record["images"][0]) if record["images"] else None for record in batch]
        blank = [image and Image.new("RGB", image.size) for image in images]
        seen = assistant.generate(prompts, images, max_new_tokens=options.max_new_tokens)
        unseen = assistant.generate(prompts, blank, max_new_tokens=options.max_new_tokens)
        for record, answer, blind in zip(batch, seen, unseen, strict=True):
            truth = record["conversation"][1]["content"]
            one = Tally(1, answer == truth, blind == truth, Counter([truth]))
            counts[record["type"]] = counts.get(record["type"], Tally()) + one
    return counts


def results(parts: Iterable[dict[str, Tally]]) -> dict[str, dict[str, float]]:
    """Tallies of all ranks -> `{type: {"accuracy", "blind", "commonest", "n"}}`, shares in 0…1."""
    total: dict[str, Tally] = {}
    for part in parts:
        for type_, counts in part.items():
            total[type_] = total.get(type_, Tally()) + counts
    return {
        type_: {
            "accuracy": t.right / t.n,
            "blind": t.blind / t.n,
            "commonest": max(t.answers.values()) / t.n,
            "n": t.n,
        }
        for type_, t in sorted(total.items())
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """`results` as a table for the screen."""
    lines = [f"{'question':12} {'accuracy':>9} {'blind':>9} {'commonest':>10} {'n':>6}"]
    for type_, row in found.items():
        shares = f"{row['accuracy']:>9.1%} {row['blind']:>9.1%} {row['commonest']:>10.1%}"
        lines.append(f"{type_:12} {shares} {row['n']:>6.0f}")
    return "\n".join(lines)
