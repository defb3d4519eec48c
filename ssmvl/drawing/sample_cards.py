"""Cards of samples as a model reads them: its images next to the text, with supervised text in color."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ssmvl.errors import DataError, MissingDependencyError
from ssmvl.files import written_whole

Kind = Literal["supervised", "context", "image", "cut"]
COLORS: dict[Kind, str] = {"supervised": "#116329", "context": "#6e7781", "image": "#0550ae", "cut": "#afb8c1"}
BANDS: dict[Kind, str] = {"supervised": "#d2f4d9", "image": "#ddf0ff"}  # background of the text
LEGEND: dict[Kind, str] = {"supervised": "supervised", "context": "context only", "image": "image places"}
PAPER, CARD, EDGE, INK = "#f6f8fa", "#ffffff", "#d0d7de", "#1f2328"

COLUMNS, LINES = 60, 14  # characters per line, maximum lines per text
SIZE, LINE, HEAD = 20, 28, 44  # in pixels: font size, line height, height of the heading
THUMB, PAD, GAP, MARGIN = 200, 22, 20, 32
ACROSS, MAX_IMAGES = 2, 9
SYMBOLS = {"\n": "↵\n", "\t": "⇥"}


class Run(NamedTuple):
    """A stretch of text of one kind."""

    text: str
    kind: Kind


class Card(NamedTuple):
    """One sample: its name and a note in the heading, its images, and its text as runs."""

    name: str
    note: str
    images: Sequence[Image.Image]
    runs: Sequence[Run]


def wrapped(runs: Sequence[Run]) -> list[list[Run]]:
    """Wrap runs to lines of at most `COLUMNS` characters, after spaces. Unprintable characters become symbols."""
    characters = [(character, run.kind) for run in runs for raw in run.text for character in _printable(raw)]
    lines, start = [], 0
    while start < len(characters):
        window = [character for character, _ in characters[start : start + COLUMNS + 1]]
        if "\n" in window:
            length = window.index("\n") + 1
        elif len(window) <= COLUMNS:
            length = len(window)
        else:  # after the last space, or within a word that fills the line
            spaces = [at for at, character in enumerate(window[:COLUMNS]) if character == " "]
            length = spaces[-1] + 1 if spaces else COLUMNS
        line = [pair for pair in characters[start : start + length] if pair[0] != "\n"]
        parts = groupby(line, key=lambda pair: pair[1])
        lines.append([Run("".join(character for character, _ in part), kind) for kind, part in parts])
        start += length
    return lines


def draw_samples(title: str, cards: Sequence[Card], png: Path) -> None:
    """Draw a PNG with a card for each sample, two per row. The file is written atomically.

    Raises:
        MissingDependencyError: matplotlib, whose fonts are used, is not installed.
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
        for column, number in enumerate(row):
            left = MARGIN + column * (width + GAP)
            draw.rounded_rectangle((left, top, left + width, top + height), 12, CARD, EDGE, 2)
            _draw_card(sheet, (left + PAD, top + PAD), cards[number], texts[number], plain, bold)
        top += height + GAP
    try:
        with written_whole(png) as partial:
            sheet.save(partial, "PNG", optimize=True)
    except (OSError, ValueError) as error:  # ValueError: a path without a file name
        raise DataError(f"{png}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _printable(character: str) -> str:
    return SYMBOLS.get(character) or (character if character.isprintable() else "·")


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
    """Draw the title on the left and the legend on the right. A title that is too long is cut."""
    advance = plain.getlength("m")
    legend = sum(advance * (len(text) + 4) for text in LEGEND.values())
    columns = int((width - 2 * MARGIN - legend) / advance)
    draw.text((MARGIN, MARGIN), _shorten(title, max(columns, 20)), INK, bold)
    x = width - MARGIN - legend + 2 * advance
    for kind, text in LEGEND.items():
        _draw_run(draw, (x, MARGIN), Run(f" {text} ", kind), plain)
        x += advance * (len(text) + 4)


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
    advance = plain.getlength("m")
    columns = int((THUMB + GAP) / advance) + COLUMNS
    draw.text((left, top), _shorten(card.name, columns - len(card.note) - 3), INK, bold)
    draw.text((left + (columns - len(card.note)) * advance, top), card.note, COLORS["context"], plain)
    top += HEAD
    _draw_images(sheet, (left, top), card.images, plain)
    for number, line in enumerate(lines):
        x = left + THUMB + GAP + 0.0
        for run in line:
            _draw_run(draw, (x, top + number * LINE), run, plain)
            x += advance * len(run.text)


def _draw_run(draw: ImageDraw.ImageDraw, corner: tuple[float, float], run: Run, font: ImageFont.FreeTypeFont) -> None:
    x, y = corner
    if run.kind in BANDS:
        draw.rectangle((x, y - 2, x + font.getlength("m") * len(run.text), y + LINE - 5), BANDS[run.kind])
    draw.text((x, y), run.text, COLORS[run.kind], font)


def _draw_images(
    sheet: Image.Image, corner: tuple[int, int], images: Sequence[Image.Image], font: ImageFont.FreeTypeFont
) -> None:
    """Draw one image large, several in a square grid, or an empty frame if there is none."""
    left, top = corner
    shown = images[:MAX_IMAGES]
    if not shown:
        draw = ImageDraw.Draw(sheet)
        draw.rounded_rectangle((left, top, left + THUMB, top + THUMB), 8, PAPER, EDGE)
        draw.text((left + THUMB / 2, top + THUMB / 2), "no image", COLORS["cut"], font, anchor="mm")
        return
    each = math.ceil(math.sqrt(len(shown)))
    side = (THUMB - 4 * (each - 1)) // each
    for number, image in enumerate(shown):
        row, column = divmod(number, each)
        method = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
        sheet.paste(image.resize((side, side), method), (left + column * (side + 4), top + row * (side + 4)))


def _shorten(text: str, columns: int) -> str:
    """Return a text as one line, cut in the middle if it is longer than `columns`."""
    line = "".join(character if character.isprintable() else "·" for character in text)
    half = max(1, columns // 2 - 1)
    return line if len(line) <= columns else f"{line[:half]}…{line[-half:]}"
