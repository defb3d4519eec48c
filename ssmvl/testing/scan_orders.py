"""The check of scan orders."""

from __future__ import annotations

from collections.abc import Sequence

from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, ScanOrder
from ssmvl.ops.reorder import path_table
from ssmvl.testing.common import name_of

MAPS = [(1, 1), (1, 7), (7, 1), (2, 3), (4, 4), (5, 3), (13, 11), (27, 27)]
GRIDS = [*(Grid(1, rows, columns) for rows, columns in MAPS), Grid(2, 3, 2), Grid(3, 1, 4)]


def check_scan_order(order: ScanOrder, grids: Sequence[Grid] = tuple(GRIDS)) -> None:
    """Over each grid the order gives (K, L) permutations, the same ones each time, with one K.

    Args:
        order: called with `grid`; gives the paths.
        grids: single rows and columns, odd and prime sizes, 27 x 27, several maps; give others for an order of certain
            numbers of maps only.

    Raises:
        ContractError: it does not; names the grid, the path and the first offending position.
    """
    name, counts = name_of(order), dict[int, Grid]()
    for grid in grids:
        paths = path_table(order, grid)
        counts.setdefault(len(paths), grid)
        if not paths.equal(path_table(order, grid)):
            raise ContractError(f"scan order {name!r} gives other paths for grid {tuple(grid)} when asked again")
    if len(counts) > 1:
        found = ", ".join(f"{count} over {tuple(grid)}" for count, grid in counts.items())
        raise ContractError(f"scan order {name!r}: K must be one number, paths come depending on the grid: {found}")
