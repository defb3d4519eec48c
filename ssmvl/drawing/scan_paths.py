"""Drawings of scan paths: text for a terminal, and PNG."""

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

from ssmvl.drawing.saving import save_png
from ssmvl.errors import DataError, MissingDependencyError

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
SPACE = 4  # spaces between two paths
GAP, MARGIN, TITLE, MAP_TITLE, MAX_WIDTH = 0.4, 0.2, 0.32, 0.24, 12.5  # inches in a PNG
NUMBERED = 0.3  # minimum side in inches of cells that show their position
INK = "#3c4048"


def terminal_drawing(paths: Tensor, grid: Grid, width: int) -> Group:
    """Draw paths (K, L) as text of `width` columns: each cell's position on the path and an arrow to the next cell.

    A map that is too wide for positions shows only arrows. One that is still too wide is cut into bands of columns.
    """
    digits = len(str(grid.length - 1))
    needed = (digits + 3) * grid.columns  # an arrow, and a space on either side
    size, note = (digits + 3, "numbers: positions") if needed <= width else (2, f"positions need {needed} columns")
    blocks = []
    for k, path in enumerate(_coordinates(paths, grid), start=1):
        block = Text.assemble((f"path {k} of {len(paths)}\n", "bold"), no_wrap=True)
        cells = _cells(path, size)
        for m in range(grid.maps):
            block.append(f"map {m + 1}\n" if grid.maps > 1 else "")
            _append_map(block, cells[m], max(1, width // size))
        blocks.append(block)
    widest = max(len(line) for block in blocks for line in block.plain.splitlines())
    per_line = _per_line(len(blocks), (width + SPACE) // (widest + SPACE))
    lines = [Columns(blocks[k : k + per_line], padding=(0, SPACE)) for k in range(0, len(blocks), per_line)]
    legend = f"{START} start (position 0)   {END} end   → next cell   {JUMP} jump   {note}"
    return Group(*lines, Text(legend, style="dim"))


def write_png(paths: Tensor, grid: Grid, png: Path) -> None:
    """Draw a PNG with one panel for each of the paths (K, L). The file is written atomically.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        DataError: the file cannot be written.
    """
    figure = _figure(_coordinates(paths, grid), grid)
    try:
        save_png(figure, png, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a path without a file name, or too many pixels
        raise DataError(f"{png}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _per_line(count: int, fitting: int) -> int:
    """Return how many of `count` panels to put in one line if `fitting` fit. Fills lines evenly: 2 + 2, not 3 + 1."""
    return math.ceil(count / math.ceil(count / max(1, fitting)))


def _coordinates(paths: Tensor, grid: Grid) -> Array:
    """Convert paths (K, L) to (K, L, 3): map, row and column of each position."""
    return np.stack(np.unravel_index(paths.numpy(), grid), axis=-1)


def _colors(length: int) -> Array:
    """Return the color gradient from the start of a path to its end: (length, 3), 0 to 255."""
    along, anchors = np.linspace(0, 1, length), np.linspace(0, 1, len(GRADIENT))
    return np.stack([np.interp(along, anchors, channel) for channel in GRADIENT.T], axis=-1)


def _cells(path: Array, size: int) -> Array:
    """Convert a path (L, 3) to an array (maps, rows, columns) of pairs (text of `size` columns, style)."""
    cells = np.empty(path.max(axis=0) + 1, dtype=object)
    symbols = [ARROWS.get(tuple(step), JUMP) for step in np.diff(path, axis=0).tolist()] + [END]
    for position, (symbol, color) in enumerate(zip(symbols, _colors(len(path)), strict=True)):
        mark = str(position) if position else START
        text = f"{mark}{symbol} " if size > 2 else symbol if position else START
        ink = "bright_white" if color @ [0.299, 0.587, 0.114] < 128 else "black"
        cells[tuple(path[position])] = text.rjust(size), Style(color=ink, bgcolor=Color.from_rgb(*color))
    return cells


def _append_map(block: Text, cells: Array, band: int) -> None:
    """Append one map's cells (rows, columns) in bands of `band` columns."""
    for first in range(0, cells.shape[1], band):
        part = cells[:, first : first + band]
        if part.shape != cells.shape:
            block.append(f"columns {first + 1} to {first + part.shape[1]}\n")
        for row in part:
            block.append_tokens(row)
            block.append("\n")


def _figure(paths: Array, grid: Grid) -> Any:
    """Draw paths (K, L, 3) in a matplotlib Figure. Its only axes spans it and is in inches, with y pointing down."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("drawing a PNG needs matplotlib: pip install 'ssmvl[train]'") from error

    side = max(grid.columns, grid.maps * grid.rows)
    cell = min(0.42, max(2.5 / side, 0.16), 12 / side)
    panel_width = max(grid.columns * cell, 0.9)
    panel_height = TITLE + grid.maps * (grid.rows * cell + _map_title(grid))
    per_line = _per_line(len(paths), int((MAX_WIDTH + GAP) // (panel_width + GAP)))
    width = 2 * MARGIN - GAP + per_line * (panel_width + GAP)
    height = 2 * MARGIN - GAP + math.ceil(len(paths) / per_line) * (panel_height + GAP)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for k, path in enumerate(paths):
        left, top = MARGIN + k % per_line * (panel_width + GAP), MARGIN + k // per_line * (panel_height + GAP)
        axes.text(left + 0.02, top, f"path {k + 1} of {len(paths)}", va="top", color=INK, fontsize=10)
        _draw_path(axes, path, grid, cell, left, top + TITLE)
    return figure


def _map_title(grid: Grid) -> float:
    """Return the height of a map's title in inches; zero for one map, and for so many that titles would dominate."""
    return MAP_TITLE if 1 < grid.maps <= 20 else 0.0


def _draw_path(axes: Any, path: Array, grid: Grid, cell: float, left: float, top: float) -> None:
    """Draw one path (L, 3) and its cells, with the maps stacked vertically; `cell`, `left` and `top` are in inches."""
    from matplotlib.collections import LineCollection, PolyCollection

    title = _map_title(grid)
    tops = top + title + np.arange(grid.maps) * (grid.rows * cell + title)
    for m in range(grid.maps if title else 0):
        axes.text(left + 0.02, tops[m] - 0.04, f"map {m + 1}", va="bottom", color=INK, fontsize=7.5)
    centers = np.stack([left + (path[:, 2] + 0.5) * cell, tops[path[:, 0]] + (path[:, 1] + 0.5) * cell], axis=-1)
    colors = _colors(len(path)) / 255
    tiles = centers[:, None] + 0.37 * cell * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    tints = 1 - 0.13 * (1 - colors)
    axes.add_collection(PolyCollection(tiles, color=tints, lw=14 * cell, joinstyle="round"))

    lines, colors = np.stack([centers[:-1], centers[1:]], axis=1), (colors[:-1] + colors[1:]) / 2
    steps = np.diff(path, axis=0)
    near = (steps[:, 0] == 0) & (np.abs(steps).max(axis=1) == 1)
    # if most steps are jumps, as between stitched maps, their lines would hide the cells
    if 2 * near.sum() >= len(near):
        jumps = LineCollection(lines[~near], colors=colors[~near], lw=4 * cell, ls=(0, (3, 3)), alpha=0.45)
        axes.add_collection(jumps)
    if cell >= NUMBERED:
        for position, (x, y) in enumerate(centers):
            axes.text(x - 0.42 * cell, y - 0.4 * cell, str(position), va="top", color=INK, fontsize=12 * cell)
    axes.add_collection(LineCollection(lines[near], colors=colors[near], lw=7 * cell, capstyle="round"))
    every = math.ceil(0.25 / cell)  # with small cells, only some steps have an arrowhead
    shown = near & (np.arange(len(near)) % every == every - 1)
    along = (lines[:, 1] - lines[:, 0])[shown]
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    across = along[:, ::-1] * [-1, 1]
    head = np.stack([along, 0.85 * across - 0.8 * along, -0.4 * along, -0.85 * across - 0.8 * along], axis=1)
    tips = lines[shown].mean(axis=1)[:, None] + max(0.19 * cell, 0.045) * head
    axes.add_collection(PolyCollection(tips, color=colors[shown], lw=2 * cell, joinstyle="round"))
    axes.scatter(*centers[0], s=max(30 * cell, 8) ** 2, color=[GRADIENT[0] / 255], zorder=5)
    axes.scatter(*centers[-1], s=max(27 * cell, 7) ** 2, color=[GRADIENT[-1] / 255], marker="s", zorder=5)
