"""MambaVLM's scan orders over the maps of a visual long sequence; over a single map both are `csm`.

Source: MambaVLM §3.2, Fig. 3, with two maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmvl.interfaces import Grid
from ssmvl.scans import csm


def cross_cat(grid: Grid) -> Tensor:
    """Each of the four orders of `csm` over the first map, then over the second, and so on. (4, L)."""
    return _on_each_map(grid).flatten(1)


def cross_stitch(grid: Grid) -> Tensor:
    """Each of the four orders of `csm`, at every step one map after the other: a0 b0 a1 b1 … (4, L)."""
    return _on_each_map(grid).transpose(1, 2).flatten(1)


def _on_each_map(grid: Grid) -> Tensor:
    """`csm` of every map alone. (4, maps, N)."""
    maps, rows, columns = grid
    return csm(Grid(1, rows, columns))[:, None] + torch.arange(maps)[:, None] * rows * columns
