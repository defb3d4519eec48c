"""Check of scan orders."""

from __future__ import annotations

from collections.abc import Sequence

from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, ScanOrder
from ssmvl.ops.reorder import path_table
from ssmvl.testing.common import name_of

MAPS = [(1, 1), (1, 7), (7, 1), (2, 3), (4, 4), (5, 3), (13, 11), (27, 27)]
GRIDS = [*(Grid(1, rows, columns) for rows, columns in MAPS), Grid(2, 3, 2), Grid(3, 1, 4)]


def check_scan_order(order: ScanOrder, grids: Sequence[Grid] = tuple(GRIDS)) -> None:
    """Check that a scan order returns (K, L) permutations for each grid, deterministically and with one K.

    Args:
        order: called with `grid`; returns the paths.
        grids: by default single rows and columns, odd and prime sizes, 27 x 27 and several maps; pass others if the
            order supports only certain numbers of maps.

    Raises:
        ContractError: the order violates its contract; names the grid, the path and the first wrong position.
    """
    name, counts = name_of(order), dict[int, Grid]()
    for grid in grids:
        paths = path_table(order, grid)
        counts.setdefault(len(paths), grid)
        if not paths.equal(path_table(order, grid)):
            raise ContractError(f"scan order {name!r} returns other paths for grid {tuple(grid)} on the second call")
    if len(counts) > 1:
        shown = ", ".join(f"{count} over {tuple(grid)}" for count, grid in counts.items())
        raise ContractError(f"scan order {name!r}: the number of paths K must not depend on the grid, received {shown}")
