"""The sheet of samples: its lines are the text, and what it shows can be seen in its pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ssmvl.drawing.sample_cards import BANDS, COLOURS, COLUMNS, Card, Run, draw_samples, wrapped
from ssmvl.errors import DataError


def card(*colours: str, runs: tuple[Run, ...] = (Run("In: what?\n", "read"), Run("that", "learned"))) -> Card:
    return Card("sample-1", "9 tokens, 1 learned", [Image.new("RGB", (8, 8), colour) for colour in colours], runs)


def pixels(cards: list[Card], folder: Path, title: str = "title") -> np.ndarray:
    draw_samples(title, cards, folder / "sheet.png")
    return np.asarray(Image.open(folder / "sheet.png"))


def share(picture: np.ndarray, colour: str) -> float:
    wanted = (np.array(to_rgb(colour)) * 255).round()
    return float((np.abs(picture - wanted).max(axis=-1) <= 2).mean())


def text(lines: list[list[Run]]) -> str:
    return "".join(run.text for line in lines for run in line)


@pytest.mark.parametrize("words", ["a bc def " * 40, "x" * 200, "", " ", "a" * COLUMNS + " b", "é数 " * 50])
def test_lines_hold_the_whole_text(words: str) -> None:
    lines = wrapped([Run(words[:7], "read"), Run(words[7:], "learned")])
    assert text(lines) == words
    assert all(sum(len(run.text) for run in line) <= COLUMNS for line in lines)
    assert all(run.kind == "learned" for line in lines[1:] for run in line)


def test_lines_break_behind_blanks_and_line_breaks() -> None:
    lines = wrapped([Run("a" * 50 + " " + "b" * 20 + "\n\nc\td\0", "read")])
    assert [text([line]) for line in lines] == ["a" * 50 + " ", "b" * 20 + "↵", "↵", "c⇥d·"]


def test_runs_keep_their_kind_within_a_line() -> None:
    runs = [Run("⟨image × 9⟩", "image"), Run("In: ", "read"), Run("yes", "learned")]
    assert wrapped(runs) == [runs]


def test_what_is_learned_is_seen_and_grows_with_the_text(tmp_path: Path) -> None:
    short = share(pixels([card("red")], tmp_path), BANDS["learned"])
    longer = share(pixels([card("red", runs=(Run("that " * 60, "learned"),))], tmp_path), BANDS["learned"])
    assert 0 < 3 * short < longer
    only_read = pixels([card("red", runs=(Run("that " * 60, "read"),))], tmp_path)
    assert share(only_read, BANDS["learned"]) < short  # the legend's
    assert share(only_read, COLOURS["read"]) > 0


def test_every_image_of_a_sample_is_shown(tmp_path: Path) -> None:
    one, four = pixels([card("red")], tmp_path), pixels([card("red", "blue", "lime", "yellow")], tmp_path)
    assert share(one, "red") > 3 * share(four, "red") > 0
    assert all(share(four, colour) > 0 for colour in ("blue", "lime", "yellow"))
    assert share(pixels([card()], tmp_path), "red") == 0


def test_two_cards_stand_side_by_side_and_a_third_below(tmp_path: Path) -> None:
    one, two, three = (pixels([card("red")] * count, tmp_path).shape for count in (1, 2, 3))
    assert one[0] == two[0] < three[0]
    assert one[1] < two[1] == three[1]


@pytest.mark.parametrize("name", ["$x^{$", "a\nb", "long " * 60, "数字?", "", "\udc80"])
def test_any_text_can_be_shown(tmp_path: Path, name: str) -> None:
    made = Card(name, "1 token", [], [Run(name, "learned"), Run(" … 7 tokens … ", "cut")])
    assert pixels([made], tmp_path, title=name).ndim == 3


@pytest.mark.parametrize("place", ["no/such/folder.png", "."])
def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path, place: str) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        draw_samples("title", [card("red")], tmp_path / place)
