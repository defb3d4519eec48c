"""Drawings of scan paths: text for a terminal, and PNG."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from ssmvl.drawing.scan_paths import terminal_drawing, write_png
from ssmvl.errors import DataError, MissingDependencyError
from ssmvl.interfaces import Grid
from ssmvl.ops.reorder import path_table
from ssmvl.plugins import components
from ssmvl.scans import bsm, csm, raster

LEGEND = "● start (position 0)   ■ end   → next cell   ↷ jump   "
CENTER_TO = {0: "↖", 1: "↑", 2: "↗", 3: "←", 5: "→", 6: "↙", 7: "↓", 8: "↘"}


def drawn(paths: torch.Tensor, grid: Grid, width: int = 80, **options: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=width, **options).print(terminal_drawing(paths, grid, width))
    return out.getvalue()


def lines(paths: torch.Tensor, grid: Grid, width: int = 80) -> list[str]:
    return [line.rstrip() for line in drawn(paths, grid, width).splitlines()]


def test_golden_raster() -> None:
    assert lines(raster(Grid(1, 2, 3)), Grid(1, 2, 3)) == [
        "path 1 of 1",
        " ●→  1→  2↷",
        " 3→  4→  5■",
        "",
        LEGEND + "numbers: positions",
    ]


def test_golden_csm() -> None:
    assert lines(csm(Grid(1, 2, 3)), Grid(1, 2, 3)) == [
        "path 1 of 4     path 2 of 4     path 3 of 4     path 4 of 4",
        " ●→  1→  2↷      5■  4←  3←      ●↓  2↓  4↓      5■  3↙  1↙",
        " 3→  4→  5■      2↷  1←  ●←      1↗  3↗  5■      4↑  2↑  ●↑",
        "",
        LEGEND + "numbers: positions",
    ]


@pytest.mark.parametrize(("neighbor", "arrow"), CENTER_TO.items())
def test_each_neighbor_has_its_arrow(neighbor: int, arrow: str) -> None:
    path = torch.tensor([[4, neighbor, *(cell for cell in CENTER_TO if cell != neighbor)]])
    assert lines(path, Grid(1, 3, 3))[2][4:8] == f" ●{arrow} ".rstrip().ljust(4)


def test_a_step_to_a_distant_cell_is_a_jump() -> None:
    assert lines(torch.tensor([[0, 2, 1, 3]]), Grid(1, 1, 4))[1] == " ●↷  2↷  1←  3■"


def test_maps_have_headings_and_a_step_between_maps_is_a_jump() -> None:
    assert lines(raster(Grid(2, 1, 2)), Grid(2, 1, 2))[:5] == ["path 1 of 1", "map 1", " ●→  1↷", "map 2", " 2→  3■"]


@pytest.mark.parametrize(("width", "counts"), [(30, [1] * 4), (64, [2, 2]), (120, [2, 2]), (132, [4])])
def test_paths_fill_lines_evenly(width: int, counts: list[int]) -> None:
    per_line = [line.count("path") for line in lines(csm(Grid(1, 4, 6)), Grid(1, 4, 6), width) if "path" in line]
    assert per_line == counts


def test_a_wide_map_omits_positions_and_a_wider_one_is_split_into_bands() -> None:
    grid = Grid(1, 2, 12)
    assert lines(raster(grid), grid, width=59)[1:3] == [" ● → → → → → → → → → → ↷", " → → → → → → → → → → → ■"]
    assert lines(raster(grid), grid, width=60)[2].endswith(" 22→  23■")
    assert lines(raster(grid), grid, width=16)[1:7] == [
        "columns 1 to 8",
        " ● → → → → → → →",
        " → → → → → → → →",
        "columns 9 to 12",
        " → → → ↷",
        " → → → ■",
    ]


def test_only_a_terminal_gets_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    grid, terminal = Grid(1, 2, 3), {"force_terminal": True, "color_system": "truecolor"}
    colored = drawn(raster(grid), grid, **terminal)
    start, end = colored.index("48;2;13;8;135m ●→ "), colored.index("48;2;252;166;54m 5■ ")
    assert start < end
    assert "\x1b" not in drawn(raster(grid), grid)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "48;" not in drawn(raster(grid), grid, **terminal)


def test_every_registered_order_can_be_drawn(tmp_path: Path) -> None:
    names = components().names("scan_order")
    assert {"raster", "bsm", "csm"} <= set(names)
    for name in names:
        for grid in (Grid(1, 1, 1), Grid(1, 4, 6), Grid(2, 3, 5)):
            paths = path_table(components().find("scan_order", name).load(), grid)
            text = drawn(paths, grid)
            assert (text.count("●"), text.count("■")) == (len(paths) + 1, len(paths) + 1)  # one more in the legend
            write_png(paths, grid, tmp_path / f"{name}.png")
            with Image.open(tmp_path / f"{name}.png") as image:
                assert image.format == "PNG"


def test_the_png_grows_with_the_number_of_paths(tmp_path: Path) -> None:
    grid, sizes = Grid(1, 4, 6), []
    for order in (raster, bsm, csm):
        write_png(order(grid), grid, tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as image:
            sizes.append(image.width)
            colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
        assert {(255, 255, 255), (13, 8, 135), (252, 166, 54)} <= colors  # background, start, end
    assert sizes == sorted(set(sizes))
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize(("grid", "solid"), [(Grid(1, 1, 2), True), (Grid(1, 2, 1), True), (Grid(2, 1, 1), False)])
def test_the_png_draws_jumps_lighter(grid: Grid, solid: bool, tmp_path: Path) -> None:
    write_png(raster(grid), grid, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    full = {(red, 87, blue) for red in (132, 133) for blue in (94, 95)}  # midway from the start's to the end's color
    assert bool(full & colors) is solid


def test_many_paths_wrap_and_large_grids_fit_on_a_page(tmp_path: Path) -> None:
    for grid in (Grid(1, 27, 27), Grid(1, 1, 3000), Grid(3000, 1, 1)):
        write_png(csm(grid), grid, tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as image:
            assert max(image.size) < 2000


@pytest.mark.parametrize("png", ["nosuch/x.png", "file/x.png", "folder", "", "x" * 300])
def test_a_path_that_cannot_be_written_is_named(png: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    with pytest.raises(DataError, match="cannot be written") as raised:
        write_png(raster(Grid(1, 1, 2)), Grid(1, 1, 2), Path(png))
    assert str(raised.value).startswith(f"{Path(png)}: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_halfway(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "x.png").write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail_halfway)
    with pytest.raises(DataError, match=r"x.png: cannot be written \(No space left on device\)"):
        write_png(raster(Grid(1, 1, 2)), Grid(1, 1, 2), tmp_path / "x.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.png", b"old")]


def test_missing_matplotlib_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ssmvl\[train\]'"):
        write_png(raster(Grid(1, 1, 2)), Grid(1, 1, 2), tmp_path / "x.png")
    assert drawn(raster(Grid(1, 1, 2)), Grid(1, 1, 2)).startswith("path 1 of 1")
