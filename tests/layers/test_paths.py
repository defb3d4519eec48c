from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid
from ssmvl.layers.paths import PathTables
from ssmvl.scans import bsm

CPU, META = torch.device("cpu"), torch.device("meta")


def test_an_order_is_evaluated_once_per_grid() -> None:
    grids: list[Grid] = []

    def order(grid: Grid) -> Tensor:
        grids.append(grid)
        return bsm(grid)

    tables, wide, high = PathTables(order, Grid(1, 2, 3)), Grid(1, 2, 3), Grid(1, 3, 2)
    for _ in range(3):
        for grid in (wide, high):
            assert tables(grid, CPU).order.equal(bsm(grid))
            assert tables(grid, CPU).inverse.equal(bsm(grid).argsort(1))
    assert {table.device for table in tables(wide, META)} == {META}
    assert (grids, tables.count) == ([wide, high], 2)


def test_tables_made_in_inference_mode_can_be_trained_with() -> None:
    tables = PathTables(bsm, Grid(1, 1, 2))
    with torch.inference_mode():
        both = [tables(Grid(1, 1, 3), device) for device in (CPU, META)]
    assert [table.is_inference() for paths in both for table in paths] == [False] * 4


def test_an_order_that_is_not_a_permutation_is_rejected() -> None:
    with pytest.raises(ContractError, match="path 0 is not a permutation"):
        PathTables(lambda grid: torch.zeros(1, grid.length, dtype=torch.int64), Grid(1, 1, 3))
