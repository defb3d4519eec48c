from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid
from ssmvl.layers.paths import PathTables
from ssmvl.scans import bsm

CPU, META = torch.device("cpu"), torch.device("meta")


def test_an_order_is_asked_once_for_each_grid_and_device() -> None:
    asked: list[Grid] = []

    def order(grid: Grid) -> Tensor:
        asked.append(grid)
        return bsm(grid)

    tables, wide, high = PathTables(order), Grid(1, 2, 3), Grid(1, 3, 2)
    for _ in range(3):
        for grid in (wide, high):
            assert tables(grid, CPU).equal(bsm(grid))
    assert tables(wide, META).device == META
    assert asked == [wide, high, wide]


def test_tables_made_in_inference_mode_can_be_trained_with() -> None:
    tables = PathTables(bsm)
    with torch.inference_mode():
        made = [tables(Grid(1, 1, 3), device) for device in (CPU, META)]
    assert [table.is_inference() for table in made] == [False, False]


def test_what_is_no_permutation_is_refused() -> None:
    tables = PathTables(lambda grid: torch.zeros(1, grid.length, dtype=torch.int64))
    with pytest.raises(ContractError, match="path 0 is no permutation"):
        tables(Grid(1, 1, 3), CPU)
