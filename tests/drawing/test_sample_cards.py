"""Sheets of sample cards: their lines contain the whole text, and images and colors appear in the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ssmvl.drawing.sample_cards import BANDS, COLORS, COLUMNS, Card, Run, draw_samples, wrapped
from ssmvl.errors import DataError


def card(*colors: str, runs: tuple[Run, ...] = (Run("In: what?\n", "context"), Run("that", "supervised"))) -> Card:
    return Card("sample-1", "9 tokens, 1 supervised", [Image.new("RGB", (8, 8), color) for color in colors], runs)


def pixels(cards: list[Card], folder: Path, title: str = "title") -> np.ndarray:
    draw_samples(title, cards, folder / "sheet.png")
    return np.asarray(Image.open(folder / "sheet.png"))


def share(sheet: np.ndarray, color: str) -> float:
    expected = (np.array(to_rgb(color)) * 255).round()
    return float((np.abs(sheet - expected).max(axis=-1) <= 2).mean())


def text(lines: list[list[Run]]) -> str:
    return "".join(run.text for line in lines for run in line)


@pytest.mark.parametrize("words", ["a bc def " * 40, "x" * 200, "", " ", "a" * COLUMNS + " b", "é数 " * 50])
def test_lines_contain_the_whole_text(words: str) -> None:
    lines = wrapped([Run(words[:7], "context"), Run(words[7:], "supervised")])
    assert text(lines) == words
    assert all(sum(len(run.text) for run in line) <= COLUMNS for line in lines)
    assert all(run.kind == "supervised" for line in lines[1:] for run in line)


def test_lines_break_after_spaces_and_line_breaks() -> None:
    lines = wrapped([Run("a" * 50 + " " + "b" * 20 + "\n\nc\td\0", "context")])
    assert [text([line]) for line in lines] == ["a" * 50 + " ", "b" * 20 + "↵", "↵", "c⇥d·"]


def test_runs_keep_their_kind_within_a_line() -> None:
    runs = [Run("⟨image × 9⟩", "image"), Run("In: ", "context"), Run("yes", "supervised")]
    assert wrapped(runs) == [runs]


def test_the_supervised_area_is_visible_and_grows_with_the_text(tmp_path: Path) -> None:
    short = share(pixels([card("red")], tmp_path), BANDS["supervised"])
    longer = share(pixels([card("red", runs=(Run("that " * 60, "supervised"),))], tmp_path), BANDS["supervised"])
    assert 0 < 3 * short < longer
    context = pixels([card("red", runs=(Run("that " * 60, "context"),))], tmp_path)
    assert share(context, BANDS["supervised"]) < short  # only in the legend
    assert share(context, COLORS["context"]) > 0


def test_every_image_of_a_sample_is_shown(tmp_path: Path) -> None:
    one, four = pixels([card("red")], tmp_path), pixels([card("red", "blue", "lime", "yellow")], tmp_path)
    assert share(one, "red") > 3 * share(four, "red") > 0
    assert all(share(four, color) > 0 for color in ("blue", "lime", "yellow"))
    assert share(pixels([card()], tmp_path), "red") == 0


def test_two_cards_are_side_by_side_and_a_third_is_below(tmp_path: Path) -> None:
    one, two, three = (pixels([card("red")] * count, tmp_path).shape for count in (1, 2, 3))
    assert one[0] == two[0] < three[0]
    assert one[1] < two[1] == three[1]


@pytest.mark.parametrize("name", ["$x^{$", "a\nb", "long " * 60, "数字?", "", "\udc80"])
def test_any_text_can_be_drawn(tmp_path: Path, name: str) -> None:
    made = Card(name, "1 token", [], [Run(name, "supervised"), Run(" … 7 tokens … ", "cut")])
    assert pixels([made], tmp_path, title=name).ndim == 3


@pytest.mark.parametrize("path", ["no/such/dir.png", "."])
def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        draw_samples("title", [card("red")], tmp_path / path)
