"""Accuracy by type of question, with confidence intervals and baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypedDict

from rich.table import Table
from rich.text import Text

from ssmvl.evaluation.runner import Answered


class Row(TypedDict):
    """Scores of one type of question; shares from 0 to 1."""

    accuracy: float
    interval: tuple[float, float]  # of the accuracy, 95 % (Wilson)
    blind: float  # accuracy with a black image
    swapped: float  # accuracy with another record's image
    commonest: float  # share of the commonest true answer
    n: int


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
