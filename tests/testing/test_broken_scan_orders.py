"""Broken scan orders that `check_scan_order` must reject."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, ScanOrder
from ssmvl.scans import bsm, raster
from ssmvl.testing import check_scan_order


def skips_one(grid: Grid) -> Tensor:
    return raster(grid).clamp(max=max(0, grid.length - 2))


def square_only(grid: Grid) -> Tensor:
    return raster(Grid(1, grid.columns, grid.columns))


def random(grid: Grid) -> Tensor:
    return torch.randperm(grid.length)[None]


def more_for_more_rows(grid: Grid) -> Tensor:
    return bsm(grid) if grid.rows > 1 else raster(grid)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (skips_one, r"'skips_one' over grid \(1, 1, 7\): path 0 .* position 6 holds index 5 again"),
        (square_only, r"must return paths \(K, 7\), returned \(1, 49\)"),
        (random, r"returns other paths for grid \(1, 1, 7\) on the second call"),
        (more_for_more_rows, r"K must not depend on the grid, received 1 over \(1, 1, 1\), 2 over \(1, 7, 1\)"),
    ],
)
def test_a_broken_scan_order_is_rejected(order: ScanOrder, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_scan_order(order)
