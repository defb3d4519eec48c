"""Scan order along a Hilbert curve over any grid."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ssmvl.interfaces import Grid


def hilbert(grid: Grid) -> Tensor:
    """A Hilbert curve through rows x columns, and its reverse. (2, L).

    The forward path starts in the top left cell. In any grid, including odd and prime sides and single rows and
    columns, each step moves to one of the four neighbors. On a square of side 2^n it is the Hilbert curve that ends in
    the top right cell, so it visits each aligned square of side 2^k contiguously. Several maps are visited one after
    the other, each from its own top left cell; only the step from one map to the next is not to a neighbor.

    Source: Hilbert, "Ueber die stetige Abbildung einer Linie auf ein Flächenstück", 1891, for squares of side 2^n.
    """
    if grid.columns >= grid.rows:
        column, row = _cells(grid.columns, grid.rows).unbind(1)
    else:
        row, column = _cells(grid.rows, grid.columns).unbind(1)
    first_cells = torch.arange(grid.maps) * grid.rows * grid.columns
    path = (first_cells[:, None] + row * grid.columns + column).reshape(-1)
    return torch.stack([path, path.flip(0)])


def _cells(long: int, short: int) -> Tensor:
    """The cells (along, across) of a rectangle in path order, from (0, 0); `long` >= `short`. (long * short, 2)."""

    @functools.cache  # for this rectangle only; its parts have few distinct sizes
    def curve(main: int, cross: int) -> Tensor:
        """A curve from (0, 0) to (main - 1, 0). (main * cross, 2).

        Requires an even `main`, or both odd: on a chessboard, the ends of any other such curve would have the wrong
        colors. Also requires `cross` = 1 if `main` = 1. All recursive calls below meet these requirements.
        """
        if cross == 1 or main == 0:
            return torch.stack([torch.arange(main), torch.zeros(main, dtype=torch.int64)], dim=1)
        if main == 2:  # out and back
            out = curve(cross, 1).flip(1)
            return torch.cat([out, out.flip(0) + torch.tensor([1, 0])])
        if 2 * main > 3 * cross:  # two consecutive parts
            left = _even_half(main)
            return torch.cat([curve(left, cross), curve(main - left, cross) + torch.tensor([left, 0])])
        left, depth = main // 2, _even_half(cross)  # out, across and back; out and back are transposed
        over = curve(main, cross - depth) + torch.tensor([0, depth])
        back = torch.tensor([main - 1, depth - 1]) - curve(depth, main - left).flip(1)
        return torch.cat([curve(depth, left).flip(1), over, back])

    if short % 2 == 1 or long % 2 == 0:
        return curve(long, short)
    # Odd by even: an even `lead` first, so that the rest is nearly square; the rest is then crossed to its far side.
    lead = long - short - 1 if long > 2 * short else 0
    return torch.cat([curve(lead, short), curve(short, long - lead).flip(1) + torch.tensor([lead, 0])])


def _even_half(side: int) -> int:
    """The even number nearest to half of `side`; the larger one in a tie."""
    return (side + 2) // 4 * 2
