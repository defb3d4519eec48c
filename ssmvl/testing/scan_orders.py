"""The check of scan orders."""

from __future__ import annotations

from collections.abc import Sequence

from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, ScanOrder
from ssmvl.ops.reorder import path_table

GRIDS = [
    Grid(1, rows, columns) for rows, columns in ((1, 1), (1, 7), (7, 1), (2, 3), (4, 4), (5, 3), (13, 11), (27, 27))
]


def check_scan_order(order: ScanOrder, grids: Sequence[Grid] = tuple(GRIDS)) -> None:
    """Over each grid the order gives (K, L) permutations, the same ones each time, with one K.

    Args:
        order: grid -> paths.
        grids: single rows and columns, odd and prime sizes, 27 x 27; give others for an order of several maps.

    Raises:
        ContractError: it does not; names the grid, the path and the first offending position.
    """
    counts = set()
    for grid in grids:
        paths = path_table(order, grid)
        counts.add(len(paths))
        if not paths.equal(path_table(order, grid)):
            raise ContractError(f"{order} gives other paths for grid {tuple(grid)} when asked again")
    if len(counts) > 1:
        raise ContractError(f"{order} gives {sorted(counts)} paths, depending on the grid; K must be one number")
