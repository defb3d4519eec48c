"""Scan orders of the core: grid -> (K, L) permutations of the flattened grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmvl.interfaces import Grid

__all__ = ["raster", "bsm", "csm"]


def raster(grid: Grid) -> Tensor:
    """Row by row, left to right. (1, L)."""
    return torch.arange(grid.length)[None]


def bsm(grid: Grid) -> Tensor:
    """Bidirectional scan: row by row, forward and backward. (2, L). Source: ML-Mamba §3.3."""
    forward = torch.arange(grid.length)
    return torch.stack([forward, forward.flip(0)])


def csm(grid: Grid) -> Tensor:
    """Cross scan: row by row and column by column, each forward and backward. (4, L). Source: ML-Mamba §3.3."""
    rows = torch.arange(grid.length)
    columns = rows.reshape(grid).transpose(1, 2).reshape(-1)
    return torch.stack([rows, rows.flip(0), columns, columns.flip(0)])
