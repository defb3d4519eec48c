"""Accuracy by type of question, with confidence intervals and baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypedDict

from rich.table import Table
from rich.text import Text

from ssmvl.evaluation.runner import Answered


class Row(TypedDict):
    """Scores of one type of question. Shares are from 0 to 1."""

    accuracy: float
    interval: tuple[float, float]  # of the accuracy: 95% Wilson interval
    blind: float  # accuracy with a black image
    swapped: float  # accuracy with another record's image
    commonest: float  # share of the most common true answer
    n: int


def results(answered: Iterable[Answered]) -> dict[str, Row]:
    """Compute one row for each type of question, sorted by type. An answer is correct if it matches exactly."""
    from scipy.stats import binomtest

    types: dict[str, list[Answered]] = {}
    for answer in answered:
        types.setdefault(answer.type, []).append(answer)
    rows = {}
    for type_, group in sorted(types.items()):
        n, correct = len(group), sum(answer.seen == answer.truth for answer in group)
        low, high = binomtest(correct, n).proportion_ci(method="wilson")
        rows[type_] = Row(
            accuracy=correct / n,
            interval=(float(low), float(high)),
            blind=sum(answer.blind == answer.truth for answer in group) / n,
            swapped=sum(answer.swapped == answer.truth for answer in group) / n,
            commonest=max(Counter(answer.truth for answer in group).values()) / n,
            n=n,
        )
    return rows


def table(rows: Mapping[str, Row]) -> Table:
    """Format `results` as a table for the terminal."""
    shown = Table("question", box=None, pad_edge=False)
    for title in ("accuracy", "95% interval", "blank image", "other image", "most common", "n"):
        shown.add_column(title, justify="right")
    for type_, row in rows.items():
        low, high = row["interval"]
        shares = (f"{share:.1%}" for share in (row["blind"], row["swapped"], row["commonest"]))
        shown.add_row(Text(type_), f"{row['accuracy']:.1%}", f"{low:.1%} – {high:.1%}", *shares, str(row["n"]))
    return shown
