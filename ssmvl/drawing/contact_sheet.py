"""Contact sheet: images with a question about each, the model's answer, and the correct answer if it was wrong."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ssmvl.drawing.saving import save_png

RIGHT, WRONG = "#1a7f37", "#cf222e"


class Cell(NamedTuple):
    """One image of the sheet, with its question, the model's answer and the correct answer."""

    image: Image.Image
    question: str
    answer: str
    truth: str


def draw_contact_sheet(rows: Mapping[str, Sequence[Cell]], png: Path) -> None:
    """Draw a PNG with one row of cells for each type of question. Needs at least one cell."""
    from matplotlib.figure import Figure

    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.6 * columns + 0.3, 2.35 * len(rows)), layout="constrained")
    for axes, (type_, cells) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        axes[0].text(
            -0.12,
            0.5,
            textwrap.shorten(type_, 20, placeholder="…"),
            rotation=90,
            ha="right",
            va="center",
            transform=axes[0].transAxes,
            color="0.4",
            parse_math=False,
        )
        for each in axes:
            each.set_axis_off()
        for each, cell in zip(axes, cells, strict=False):
            right = cell.answer == cell.truth
            each.imshow(cell.image, interpolation="nearest")
            each.set_title("\n".join(textwrap.wrap(cell.question, 20)[:3]), fontsize=8, parse_math=False)
            verdict = f"✓ {cell.answer}" if right else f"✗ {cell.answer}  (it is {cell.truth})"
            below = textwrap.shorten(verdict, 40, placeholder="…")
            each.text(
                0.5, -0.06, below, ha="center", va="top", transform=each.transAxes, fontsize=9,
                color=RIGHT if right else WRONG, parse_math=False,
            )  # fmt: skip
    save_png(figure, png, dpi=110)
