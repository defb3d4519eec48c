"""Samples as a model reads them: the images it gets, and beside them the text, with what it learns in colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ssmvl.errors import DataError, MissingDependencyError
from ssmvl.files import written_whole

Kind = Literal["learned", "read", "image", "cut"]
COLOURS: dict[Kind, str] = {"learned": "#116329", "read": "#6e7781", "image": "#0550ae", "cut": "#afb8c1"}
BANDS: dict[Kind, str] = {"learned": "#d2f4d9", "image": "#ddf0ff"}  # behind the text
LEGEND: dict[Kind, str] = {"learned": "learned", "read": "only read", "image": "places of an image"}
PAPER, CARD, EDGE, INK = "#f6f8fa", "#ffffff", "#d0d7de", "#1f2328"

COLUMNS, LINES = 60, 14  # letters of a line, lines of a text at the most
SIZE, LINE, HEAD = 20, 28, 44  # pixels: letters, from line to line, the line with a sample's name
THUMB, PAD, GAP, MARGIN = 200, 22, 20, 32
ACROSS, MOST_IMAGES = 2, 9
SIGNS = {"\n": "↵\n", "\t": "⇥"}


class Run(NamedTuple):
    """A stretch of text of one kind."""

    text: str
    kind: Kind


class Card(NamedTuple):
    """One sample."""

    name: str
    note: str
    images: Sequence[Image.Image]
    runs: Sequence[Run]


def wrapped(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs as lines of at most `COLUMNS` letters, broken behind blanks; line breaks, tabs and the like as signs."""
    letters = [(letter, run.kind) for run in runs for raw in run.text for letter in _sign(raw)]
    lines, start = [], 0
    while start < len(letters):
        window = [letter for letter, _ in letters[start : start + COLUMNS + 1]]
        if "\n" in window:
            length = window.index("\n") + 1
        elif len(window) <= COLUMNS:
            length = len(window)
        else:  # behind the last blank; in the middle of a word that fills a line
            blanks = [at for at, letter in enumerate(window[:COLUMNS]) if letter == " "]
            length = blanks[-1] + 1 if blanks else COLUMNS
        line = [(letter, kind) for letter, kind in letters[start : start + length] if letter != "\n"]
        lines.append(
            [Run("".join(letter for letter, _ in part), kind) for kind, part in groupby(line, key=lambda pair: pair[1])]
        )
        start += length
    return lines


def draw_samples(title: str, cards: Sequence[Card], picture: Path) -> None:
    """Draw a card for each sample, two in a row, into a PNG; it is written whole or not at all.

    Raises:
        MissingDependencyError: matplotlib, whose letters are used, is not installed.
        DataError: the file cannot be written.
    """
    plain, bold = _font("DejaVuSansMono.ttf"), _font("DejaVuSansMono-Bold.ttf")
    text_width = math.ceil(plain.getlength("m") * COLUMNS)
    width = 2 * PAD + THUMB + GAP + text_width
    texts = [wrapped(card.runs) for card in cards]
    rows = [range(first, min(first + ACROSS, len(cards))) for first in range(0, len(cards), ACROSS)]
    heights = [HEAD + 2 * PAD + max(THUMB, *(LINE * len(texts[number]) for number in row)) for row in rows]
    top = MARGIN + 2 * LINE
    across = min(ACROSS, len(cards))
    sheet = Image.new(
        "RGB", (2 * MARGIN + across * width + (across - 1) * GAP, top + sum(heights) + GAP * len(rows) + MARGIN), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    _draw_title(draw, title, plain, bold, sheet.width)
    for row, height in zip(rows, heights, strict=True):
        for place, number in enumerate(row):
            left = MARGIN + place * (width + GAP)
            draw.rounded_rectangle((left, top, left + width, top + height), 12, CARD, EDGE, 2)
            _draw_card(sheet, (left + PAD, top + PAD), cards[number], texts[number], plain, bold)
        top += height + GAP
    try:
        with written_whole(picture) as partial:
            sheet.save(partial, "PNG", optimize=True)
    except (OSError, ValueError) as error:  # ValueError: a path without a name
        raise DataError(f"{picture}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _sign(letter: str) -> str:
    return SIGNS.get(letter) or (letter if letter.isprintable() else "·")


def _font(name: str) -> ImageFont.FreeTypeFont:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("drawing a PNG needs matplotlib: pip install 'ssmvl[train]'") from error
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), SIZE, layout_engine=ImageFont.Layout.BASIC)


def _draw_title(
    draw: ImageDraw.ImageDraw, title: str, plain: ImageFont.FreeTypeFont, bold: ImageFont.FreeTypeFont, width: int
) -> None:
    """The title on the left, the legend on the right; below it where both do not fit."""
    letter = plain.getlength("m")
    legend = sum(letter * (len(text) + 4) for text in LEGEND.values())
    room = int((width - 2 * MARGIN - legend) / letter)
    draw.text((MARGIN, MARGIN), _short(title, max(room, 20)), INK, bold)
    x = width - MARGIN - legend + 2 * letter
    for kind, text in LEGEND.items():
        _draw_run(draw, (x, MARGIN), Run(f" {text} ", kind), plain)
        x += letter * (len(text) + 4)


def _draw_card(
    sheet: Image.Image,
    corner: tuple[int, int],
    card: Card,
    lines: Sequence[Sequence[Run]],
    plain: ImageFont.FreeTypeFont,
    bold: ImageFont.FreeTypeFont,
) -> None:
    draw = ImageDraw.Draw(sheet)
    left, top = corner
    letter = plain.getlength("m")
    columns = int((THUMB + GAP) / letter) + COLUMNS
    draw.text((left, top), _short(card.name, columns - len(card.note) - 3), INK, bold)
    draw.text((left + (columns - len(card.note)) * letter, top), card.note, COLOURS["read"], plain)
    top += HEAD
    _draw_images(sheet, (left, top), card.images, plain)
    for number, line in enumerate(lines):
        x = left + THUMB + GAP + 0.0
        for run in line:
            _draw_run(draw, (x, top + number * LINE), run, plain)
            x += letter * len(run.text)


def _draw_run(draw: ImageDraw.ImageDraw, corner: tuple[float, float], run: Run, font: ImageFont.FreeTypeFont) -> None:
    x, y = corner
    if run.kind in BANDS:
        draw.rectangle((x, y - 2, x + font.getlength("m") * len(run.text), y + LINE - 5), BANDS[run.kind])
    draw.text((x, y), run.text, COLOURS[run.kind], font)


def _draw_images(
    sheet: Image.Image, corner: tuple[int, int], images: Sequence[Image.Image], font: ImageFont.FreeTypeFont
) -> None:
    """One image large, several as squares in a square; an empty frame where there is none."""
    left, top = corner
    shown = images[:MOST_IMAGES]
    if not shown:
        draw = ImageDraw.Draw(sheet)
        draw.rounded_rectangle((left, top, left + THUMB, top + THUMB), 8, PAPER, EDGE)
        draw.text((left + THUMB / 2, top + THUMB / 2), "no image", COLOURS["cut"], font, anchor="mm")
        return
    each = math.ceil(math.sqrt(len(shown)))
    side = (THUMB - 4 * (each - 1)) // each
    for number, image in enumerate(shown):
        row, column = divmod(number, each)
        method = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
        sheet.paste(image.resize((side, side), method), (left + column * (side + 4), top + row * (side + 4)))


def _short(text: str, columns: int) -> str:
    """A text in one line, cut in the middle where it is too long."""
    signs = "".join(letter if letter.isprintable() else "·" for letter in text)
    half = max(1, columns // 2 - 1)
    return signs if len(signs) <= columns else f"{signs[:half]}…{signs[-half:]}"
