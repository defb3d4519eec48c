"""How the features of several encoders become one sequence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Grid


class ChannelFusion(nn.Module):
    """Features joined on the channel axis, patch by patch.

    Args:
        widths: width of each encoder's features.
        grids: grid of each encoder; all must be equal.
        order: names of the encoders in the order of the channels; the recipe's own order if None.

    Raises:
        ShapeError: the grids differ, or `order` is not a permutation of the encoders.

    Source: ML-Mamba §3.2, in the released code's order (DINOv2, then SigLIP).
    """

    def __init__(self, widths: Mapping[str, int], grids: Mapping[str, Grid], *, order: list[str] | None = None) -> None:
        super().__init__()
        self.order = list(widths) if order is None else list(order)
        if sorted(self.order) != sorted(widths):
            raise ShapeError(
                f"order must name each encoder once: received {self.order}, the encoders are {list(widths)}"
            )
        if len(set(grids.values())) > 1:
            shown = ", ".join(f"{name} has {tuple(grid)}" for name, grid in grids.items())
            raise ShapeError(f"channel fusion needs equal grids (maps, rows, columns): {shown}")
        self.width = sum(widths.values())
        self.grid = grids[self.order[0]]

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """{encoder: (I, N, D_i)} -> (I, N, sum of D_i)."""
        return torch.cat([features[name] for name in self.order], dim=-1)
