"""The contact sheet: what it shows can be seen in its pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ssmvl.drawing.contact_sheet import RIGHT, WRONG, Cell, draw_contact_sheet


def cell(answer: str, colour: str = "blue", question: str = "Which digit is it?") -> Cell:
    return Cell(Image.new("RGB", (8, 8), colour), question, answer, "7")


def pixels(rows: dict[str, list[Cell]], folder: Path) -> np.ndarray:
    draw_contact_sheet(rows, folder / "sheet.png")
    return np.asarray(Image.open(folder / "sheet.png").convert("RGB"))


def shows(picture: np.ndarray, colour: str) -> bool:
    wanted = (np.array(to_rgb(colour)) * 255).round()
    return bool((np.abs(picture - wanted).max(axis=-1) <= 2).any())


@pytest.mark.parametrize(("answer", "right", "wrong"), [("7", True, False), ("8", False, True), ("", False, True)])
def test_the_verdict_has_its_colour(tmp_path: Path, answer: str, right: bool, wrong: bool) -> None:
    picture = pixels({"reading": [cell(answer)]}, tmp_path)
    assert (shows(picture, RIGHT), shows(picture, WRONG)) == (right, wrong)


def test_every_picture_is_shown_and_rows_and_columns_grow_the_sheet(tmp_path: Path) -> None:
    one = pixels({"a": [cell("7", "red")]}, tmp_path)
    more = pixels({"a": [cell("7", "red"), cell("7", "blue")], "b": [cell("8", "lime")]}, tmp_path)
    assert all(shows(more, colour) for colour in ("red", "blue", "lime"))
    assert not shows(one, "blue")
    assert all(np.array(more.shape[:2]) > one.shape[:2])


@pytest.mark.parametrize("text", ["$x^{$", "a\nb", "long " * 60, "数字?"])
def test_any_text_can_be_shown(tmp_path: Path, text: str) -> None:
    rows = {text: [Cell(Image.new("RGB", (8, 8)), text, text, "7")]}
    draw_contact_sheet(rows, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
