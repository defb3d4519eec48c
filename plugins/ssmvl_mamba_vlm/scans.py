"""MambaVLM's scan orders over the maps of a visual long sequence; for a single map both equal `csm`.

Source: MambaVLM §3.2, Fig. 3, with two maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmvl.interfaces import Grid
from ssmvl.scans import csm


def cross_cat(grid: Grid) -> Tensor:
    """The four orders of `csm`, each over the first map, then the second, and so on. (4, L)."""
    return _csm_per_map(grid).flatten(1)


def cross_stitch(grid: Grid) -> Tensor:
    """The four orders of `csm`, each with the maps interleaved at every step: a0 b0 a1 b1 … (4, L)."""
    return _csm_per_map(grid).transpose(1, 2).flatten(1)


def _csm_per_map(grid: Grid) -> Tensor:
    """`csm` of each map. (4, maps, N)."""
    maps, rows, columns = grid
    return csm(Grid(1, rows, columns))[:, None] + torch.arange(maps)[:, None] * rows * columns
