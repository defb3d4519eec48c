from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ssmvl_hilbert
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssmvl_hilbert.order import hilbert
from torch import Tensor

from ssmvl.interfaces import Grid
from ssmvl.testing import check_scan_order

ROOT = Path(__file__).parents[1]
SIDES = range(1, 25)


def forward(rows: int, columns: int) -> Tensor:
    """The forward path over one map. (L,)."""
    return hilbert(Grid(1, rows, columns))[0]


def assert_walks_every_cell(path: Tensor, rows: int, columns: int) -> None:
    """Check that the path starts top left, visits each cell once and moves to one of the four neighbors."""
    grid = f"{rows} x {columns}"
    assert path.dtype == torch.int64, grid
    assert path[0] == 0, grid
    assert torch.bincount(path, minlength=rows * columns).tolist() == [1] * (rows * columns), grid
    steps = (path // columns).diff().abs() + (path % columns).diff().abs()
    assert bool((steps == 1).all()), f"{grid}: steps {(steps != 1).nonzero().flatten().tolist()} not to a neighbor"


def l_system_curve(order: int) -> list[int]:
    """The Hilbert curve over 2^order rows and columns by the L-system A -> -BF+AFA+FB-, B -> +AF-BFB-FA+."""
    word = "A"
    for _ in range(order):
        word = "".join({"A": "-BF+AFA+FB-", "B": "+AF-BFB-FA+"}.get(letter, letter) for letter in word)
    side, cell, heading = 2**order, 0 + 0j, 1 + 0j  # columns + rows * 1j
    visited = [cell]
    for letter in word:
        if letter == "F":
            cell += heading
            visited.append(cell)
        heading *= {"+": -1j, "-": 1j}.get(letter, 1)  # rows grow downward, so - turns right
    return [int(cell.real) + int(cell.imag) * side for cell in visited]


def test_satisfies_the_contract_of_a_scan_order() -> None:
    check_scan_order(hilbert)
    check_scan_order(hilbert, [Grid(3, 1, 1), Grid(2, 3, 4), Grid(5, 7, 2)])


def test_the_path_over_2x2() -> None:
    assert hilbert(Grid(1, 2, 2)).tolist() == [[0, 2, 3, 1], [1, 3, 2, 0]]


def test_the_path_over_4x4() -> None:
    path = [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3]
    assert hilbert(Grid(1, 4, 4)).tolist() == [path, path[::-1]]


def test_the_paths_over_rectangles() -> None:
    assert forward(2, 3).tolist() == [0, 1, 2, 5, 4, 3]
    assert forward(3, 2).tolist() == [0, 2, 4, 5, 3, 1]
    assert forward(3, 3).tolist() == [0, 3, 6, 7, 8, 5, 4, 1, 2]
    assert forward(2, 4).tolist() == [0, 4, 5, 1, 2, 6, 7, 3]


def test_a_single_row_or_column_is_walked_straight() -> None:
    assert forward(1, 7).tolist() == forward(7, 1).tolist() == list(range(7))


def test_every_grid_up_to_24x24_is_walked_from_neighbor_to_neighbor() -> None:
    for rows in SIDES:
        for columns in SIDES:
            assert_walks_every_cell(forward(rows, columns), rows, columns)


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_larger_grids_are_walked_from_neighbor_to_neighbor(rows: int, columns: int) -> None:
    path = forward(rows, columns)
    assert path.shape == (rows * columns,)
    assert_walks_every_cell(path, rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(1000, 1000), (1, 100_000), (100_001, 2), (3, 50_000), (1000, 999)])
def test_large_and_narrow_grids_do_not_exceed_the_recursion_limit(rows: int, columns: int) -> None:
    path = forward(rows, columns)
    assert path.shape == (rows * columns,)
    assert_walks_every_cell(path, rows, columns)


def test_a_tall_grid_is_walked_like_the_transposed_wide_one() -> None:
    for rows in SIDES:
        for columns in range(1, rows):
            wide, tall = forward(columns, rows), forward(rows, columns)
            assert tall.tolist() == (wide % rows * columns + wide // rows).tolist(), f"{rows} x {columns}"


@pytest.mark.parametrize("order", range(8))
def test_on_squares_of_a_power_of_two_it_is_the_hilbert_curve(order: int) -> None:
    assert forward(2**order, 2**order).tolist() == l_system_curve(order)


@pytest.mark.parametrize("order", range(1, 7))
def test_aligned_squares_are_visited_contiguously(order: int) -> None:
    side = 2**order
    path = forward(side, side)
    for block in (2**k for k in range(order + 1)):
        square = path // side // block * side + path % side // block  # index of each cell's square
        runs = torch.unique_consecutive(square)
        assert len(runs) == len(runs.unique()) == (side // block) ** 2, f"{block} x {block} of {side}"


def test_cells_close_on_the_path_are_close_in_grids_that_are_not_narrow() -> None:
    for rows in SIDES:
        for columns in range(rows, min(2 * rows, 24) + 1):
            path = forward(rows, columns)
            row, column, step = path // columns, path % columns, torch.arange(len(path))
            squared_distance = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
            steps = (step[:, None] - step).abs()
            assert bool((2 * squared_distance <= 13 * steps).all()), f"{rows} x {columns}"


def test_a_narrow_grid_is_walked_from_one_end_to_the_other() -> None:
    for rows in range(1, 9):
        for columns in range(2 * rows + 1, 60):
            path = forward(rows, columns)
            ahead = torch.arange(len(path)) - path % columns * rows  # relative to a column-by-column walk
            assert bool((ahead.abs() <= 1.5 * rows**2).all()), f"{rows} x {columns}"


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12))
@settings(deadline=None)
def test_several_maps_are_walked_one_after_the_other(maps: int, rows: int, columns: int) -> None:
    cells = rows * columns
    path = hilbert(Grid(maps, rows, columns))[0].reshape(maps, cells)
    for index in range(maps):
        assert torch.equal(path[index], forward(rows, columns) + index * cells)


@given(st.builds(Grid, st.integers(1, 3), st.integers(1, 30), st.integers(1, 30)))
@settings(deadline=None)
def test_the_second_path_is_the_first_backward(grid: Grid) -> None:
    paths = hilbert(grid)
    assert paths.shape == (2, grid.length)
    assert torch.equal(paths[1], paths[0].flip(0))


def test_the_hook_registers_the_order() -> None:
    registered: list[tuple[str, str, str | Callable[..., Any]]] = []
    ssmvl_hilbert.ssmvl_register(lambda kind, name, target: registered.append((kind, name, target)))
    assert registered == [("scan_order", "hilbert", "ssmvl_hilbert.order:hilbert")]


def test_ssmvl_finds_the_order_through_the_entry_point(tmp_path: Path) -> None:
    """Run in a separate process, with the entry points of pyproject.toml as an installer would write them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = tmp_path / "ssmvl_hilbert-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = [f"{name} = {value}" for name, value in project["entry-points"]["ssmvl"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[ssmvl]", *points, ""]))
    code = (
        "import sys, ssmvl\n"
        "(entry,) = [each for each in ssmvl.list_components('scan_order') if each.name == 'hilbert']\n"
        "print(entry.source, 'torch' in sys.modules, entry.load().__name__, sep='|')"
    )
    paths = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "ssmvl-hilbert 0.1.0 (ssmvl_hilbert)|False|hilbert"
