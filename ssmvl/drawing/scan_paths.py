"""Scan paths drawn: as text for a terminal, and as a PNG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.columns import Columns
from rich.console import Group
from rich.style import Style
from rich.text import Text

from ssmvl.errors import DataError, MissingDependencyError
from ssmvl.files import written_whole

if TYPE_CHECKING:
    from torch import Tensor

    from ssmvl.interfaces import Grid

Array = NDArray[Any]
GRADIENT = np.array([[13, 8, 135], [106, 0, 168], [177, 42, 144], [225, 100, 98], [252, 166, 54]])  # plasma's 0 to 0.8
ARROWS = {
    (0, 0, 1): "→",
    (0, 1, 1): "↘",
    (0, 1, 0): "↓",
    (0, 1, -1): "↙",
    (0, 0, -1): "←",
    (0, -1, -1): "↖",
    (0, -1, 0): "↑",
    (0, -1, 1): "↗",
}
START, END, JUMP = "●", "■", "↷"
SPACE = 4  # blanks between two paths
GAP, MARGIN, TITLE, MAP_TITLE, WIDEST = 0.4, 0.2, 0.32, 0.24, 12.5  # inches of a PNG
NUMBERED = 0.3  # inches from which a cell has its position written in it
INK = "#3c4048"


def terminal_drawing(paths: Tensor, grid: Grid, width: int) -> Group:
    """Paths (K, L) as text of `width` columns: each cell's position on the path, and where the path goes from there.

    Where a map is too wide for positions only the signs are shown; one that is too wide even so is cut into bands.
    """
    digits = len(str(grid.length - 1))
    needed = (digits + 3) * grid.columns  # a sign, and a blank on either side
    size, note = (digits + 3, "numbers: positions") if needed <= width else (2, f"positions need {needed} columns")
    blocks = []
    for k, path in enumerate(_places(paths, grid), start=1):
        block = Text.assemble((f"path {k} of {len(paths)}\n", "bold"), no_wrap=True)
        cells = _cells(path, size)
        for m in range(grid.maps):
            block.append(f"map {m + 1}\n" if grid.maps > 1 else "")
            _append_map(block, cells[m], max(1, width // size))
        blocks.append(block)
    widest = max(len(line) for block in blocks for line in block.plain.splitlines())
    across = _across(len(blocks), (width + SPACE) // (widest + SPACE))
    lines = [Columns(blocks[k : k + across], padding=(0, SPACE)) for k in range(0, len(blocks), across)]
    legend = f"{START} start (position 0)   {END} end   → next cell   {JUMP} jump   {note}"
    return Group(*lines, Text(legend, style="dim"))


def write_png(paths: Tensor, grid: Grid, picture: Path) -> None:
    """Draw paths (K, L), one panel each, into a PNG; it is written whole or not at all.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        DataError: the file cannot be written.
    """
    figure = _figure(_places(paths, grid), grid)
    try:
        with written_whole(picture) as partial:
            figure.savefig(partial, format="png", dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a path without a name, or a picture of too many pixels
        raise DataError(f"{picture}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _across(count: int, fitting: int) -> int:
    """How many of `count` panels stand in one line if `fitting` fit: full lines, so 2 + 2 rather than 3 + 1."""
    return math.ceil(count / math.ceil(count / max(1, fitting)))


def _places(paths: Tensor, grid: Grid) -> Array:
    """Paths (K, L) -> (K, L, 3): map, row and column of each position."""
    return np.stack(np.unravel_index(paths.numpy(), grid), axis=-1)


def _colours(length: int) -> Array:
    """(length, 3), 0 to 255: the gradient from the start of a path to its end."""
    along, anchors = np.linspace(0, 1, length), np.linspace(0, 1, len(GRADIENT))
    return np.stack([np.interp(along, anchors, channel) for channel in GRADIENT.T], axis=-1)


def _cells(path: Array, size: int) -> Array:
    """A path (L, 3) -> (maps, rows, columns) of (text of `size` columns, style)."""
    cells = np.empty(path.max(axis=0) + 1, dtype=object)
    signs = [ARROWS.get(tuple(step), JUMP) for step in np.diff(path, axis=0).tolist()] + [END]
    for position, (sign, colour) in enumerate(zip(signs, _colours(len(path)), strict=True)):
        mark = str(position) if position else START
        text = f"{mark}{sign} " if size > 2 else sign if position else START
        ink = "bright_white" if colour @ [0.299, 0.587, 0.114] < 128 else "black"
        cells[tuple(path[position])] = text.rjust(size), Style(color=ink, bgcolor=Color.from_rgb(*colour))
    return cells


def _append_map(block: Text, cells: Array, band: int) -> None:
    """Append one map's cells (rows, columns), `band` columns at a time."""
    for first in range(0, cells.shape[1], band):
        part = cells[:, first : first + band]
        if part.shape != cells.shape:
            block.append(f"columns {first + 1} to {first + part.shape[1]}\n")
        for row in part:
            block.append_tokens(row)
            block.append("\n")


def _figure(paths: Array, grid: Grid) -> Any:
    """Paths (K, L, 3) -> a matplotlib Figure. Its one axes spans it and measures inches, downwards."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("drawing a PNG needs matplotlib: pip install 'ssmvl[train]'") from error

    side = max(grid.columns, grid.maps * grid.rows)
    cell = min(0.42, max(2.5 / side, 0.16), 12 / side)
    wide = max(grid.columns * cell, 0.9)
    high = TITLE + grid.maps * (grid.rows * cell + _map_title(grid))
    across = _across(len(paths), int((WIDEST + GAP) // (wide + GAP)))
    size = 2 * MARGIN - GAP + across * (wide + GAP), 2 * MARGIN - GAP + math.ceil(len(paths) / across) * (high + GAP)
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))
    axes.axis("off")
    for k, path in enumerate(paths):
        left, top = MARGIN + k % across * (wide + GAP), MARGIN + k // across * (high + GAP)
        axes.text(left + 0.02, top, f"path {k + 1} of {len(paths)}", va="top", color=INK, fontsize=10)
        _draw_path(axes, path, grid, cell, left, top + TITLE)
    return figure


def _map_title(grid: Grid) -> float:
    """Inches above each map; nothing above a single one, or above so many that the titles would be the picture."""
    return MAP_TITLE if 1 < grid.maps <= 20 else 0.0


def _draw_path(axes: Any, path: Array, grid: Grid, cell: float, left: float, top: float) -> None:
    """Draw one path (L, 3) with its cells, maps one below the other; `cell`, `left` and `top` in inches."""
    from matplotlib.collections import LineCollection, PolyCollection

    title = _map_title(grid)
    tops = top + title + np.arange(grid.maps) * (grid.rows * cell + title)
    for m in range(grid.maps if title else 0):
        axes.text(left + 0.02, tops[m] - 0.04, f"map {m + 1}", va="bottom", color=INK, fontsize=7.5)
    centres = np.stack([left + (path[:, 2] + 0.5) * cell, tops[path[:, 0]] + (path[:, 1] + 0.5) * cell], axis=-1)
    colours = _colours(len(path)) / 255
    tiles = centres[:, None] + 0.37 * cell * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    tints = 1 - 0.13 * (1 - colours)
    axes.add_collection(PolyCollection(tiles, color=tints, lw=14 * cell, joinstyle="round"))

    lines, colours = np.stack([centres[:-1], centres[1:]], axis=1), (colours[:-1] + colours[1:]) / 2
    steps = np.diff(path, axis=0)
    near = (steps[:, 0] == 0) & (np.abs(steps).max(axis=1) == 1)
    if 2 * near.sum() >= len(
        near
    ):  # where most steps are jumps, as between stitched maps, their lines would hide the cells
        jumps = LineCollection(lines[~near], colors=colours[~near], lw=4 * cell, ls=(0, (3, 3)), alpha=0.45)
        axes.add_collection(jumps)
    if cell >= NUMBERED:
        for position, (x, y) in enumerate(centres):
            axes.text(x - 0.42 * cell, y - 0.4 * cell, str(position), va="top", color=INK, fontsize=12 * cell)
    axes.add_collection(LineCollection(lines[near], colors=colours[near], lw=7 * cell, capstyle="round"))
    every = math.ceil(0.25 / cell)  # small cells: not every step has a head
    shown = near & (np.arange(len(near)) % every == every - 1)
    along = (lines[:, 1] - lines[:, 0])[shown]
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    across = along[:, ::-1] * [-1, 1]
    head = np.stack([along, 0.85 * across - 0.8 * along, -0.4 * along, -0.85 * across - 0.8 * along], axis=1)
    tips = lines[shown].mean(axis=1)[:, None] + max(0.19 * cell, 0.045) * head
    axes.add_collection(PolyCollection(tips, color=colours[shown], lw=2 * cell, joinstyle="round"))
    axes.scatter(*centres[0], s=max(30 * cell, 8) ** 2, color=[GRADIENT[0] / 255], zorder=5)
    axes.scatter(*centres[-1], s=max(27 * cell, 7) ** 2, color=[GRADIENT[-1] / 255], marker="s", zorder=5)
