"""Fusion: features of several encoders -> one sequence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Grid
from ssmvl.layers.linear import cast_for

__all__ = ["ChannelFusion", "SequenceFusion"]


class ChannelFusion(nn.Module):
    """Concatenation of the encoders' features along the channel axis, per patch.

    Args:
        widths: width of each encoder's features.
        grids: grid of each encoder; all must be equal.
        order: names of the encoders in channel order; the recipe's order if None.

    Raises:
        ShapeError: the grids differ, or `order` is not a permutation of the encoders.

    Source: ML-Mamba §3.2, in the released code's order (DINOv2, then SigLIP).
    """

    def __init__(self, widths: Mapping[str, int], grids: Mapping[str, Grid], *, order: list[str] | None = None) -> None:
        super().__init__()
        self.order = _order(widths, order)
        self.grid = _common_grid(grids, "channel")
        self.width = sum(widths.values())

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """{encoder: (I, N, D_i)} -> (I, N, sum of D_i)."""
        return torch.cat([features[name] for name in self.order], dim=-1)


class SequenceFusion(nn.Module):
    """Visual long sequence: the encoders' features, projected to the largest width and concatenated as a sequence.

    Each encoder has its own linear projection with bias. These are new weights, trained with the connector.

    Args:
        widths: width of each encoder's features.
        grids: grid of each encoder; all must be equal and have one map.
        order: names of the encoders in the order of the maps; the recipe's order if None.

    Raises:
        ShapeError: the grids differ or have several maps, or `order` is not a permutation of the encoders.

    Source: MambaVLM, the visual long sequence; the common width is our choice.
    """

    def __init__(self, widths: Mapping[str, int], grids: Mapping[str, Grid], *, order: list[str] | None = None) -> None:
        super().__init__()
        self.order = _order(widths, order)
        grid = _common_grid(grids, "sequence")
        if grid.maps > 1:
            raise ShapeError(f"sequence fusion needs grids of one map, but the encoders' {tuple(grid)} has {grid.maps}")
        self.grid = Grid(len(self.order), grid.rows, grid.columns)
        self.width = max(widths.values())
        self.projections = nn.ModuleDict({name: nn.Linear(widths[name], self.width) for name in self.order})

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """{encoder: (I, N, D_i)} -> (I, E*N, D) for E encoders, D the largest D_i; in the dtype of the weights."""
        maps = ((self.projections[name], features[name]) for name in self.order)
        return torch.cat([linear(cast_for(x, linear)) for linear, x in maps], dim=1)


def _order(widths: Mapping[str, int], order: list[str] | None) -> list[str]:
    order = list(widths) if order is None else list(order)
    if sorted(order) != sorted(widths):
        raise ShapeError(f"order must name each encoder once: received {order}, but the encoders are {list(widths)}")
    return order


def _common_grid(grids: Mapping[str, Grid], fusion: str) -> Grid:
    if len(set(grids.values())) > 1:
        shown = ", ".join(f"{name} has {tuple(grid)}" for name, grid in grids.items())
        raise ShapeError(f"{fusion} fusion needs equal grids (maps, rows, columns): {shown}")
    return next(iter(grids.values()))
