"""Contact sheets: verdicts, images and texts appear in the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ssmvl.drawing.contact_sheet import RIGHT, WRONG, Cell, draw_contact_sheet


def cell(answer: str, color: str = "blue", question: str = "Which digit is it?") -> Cell:
    return Cell(Image.new("RGB", (8, 8), color), question, answer, "7")


def pixels(rows: dict[str, list[Cell]], folder: Path) -> np.ndarray:
    draw_contact_sheet(rows, folder / "sheet.png")
    return np.asarray(Image.open(folder / "sheet.png").convert("RGB"))


def shows(sheet: np.ndarray, color: str) -> bool:
    expected = (np.array(to_rgb(color)) * 255).round()
    return bool((np.abs(sheet - expected).max(axis=-1) <= 2).any())


@pytest.mark.parametrize(("answer", "right", "wrong"), [("7", True, False), ("8", False, True), ("", False, True)])
def test_the_verdict_is_drawn_in_its_color(tmp_path: Path, answer: str, right: bool, wrong: bool) -> None:
    sheet = pixels({"reading": [cell(answer)]}, tmp_path)
    assert (shows(sheet, RIGHT), shows(sheet, WRONG)) == (right, wrong)


def test_every_image_is_shown_and_rows_and_columns_enlarge_the_sheet(tmp_path: Path) -> None:
    one = pixels({"a": [cell("7", "red")]}, tmp_path)
    more = pixels({"a": [cell("7", "red"), cell("7", "blue")], "b": [cell("8", "lime")]}, tmp_path)
    assert all(shows(more, color) for color in ("red", "blue", "lime"))
    assert not shows(one, "blue")
    assert all(np.array(more.shape[:2]) > one.shape[:2])


@pytest.mark.parametrize("text", ["$x^{$", "a\nb", "long " * 60, "数字?"])
def test_any_text_can_be_drawn(tmp_path: Path, text: str) -> None:
    rows = {text: [Cell(Image.new("RGB", (8, 8)), text, text, "7")]}
    draw_contact_sheet(rows, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
