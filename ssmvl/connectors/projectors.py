"""Connectors that process each position independently."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ssmvl.interfaces import Grid
from ssmvl.layers.linear import cast_for

__all__ = ["fused_mlp", "PositionwiseConnector", "MlpConnector"]


def fused_mlp(in_width: int, out_width: int) -> nn.Sequential:
    """Linear(in -> 4 in), GELU, Linear(-> out), GELU, Linear(-> out), xavier-normal. Source: ML-Mamba, Cobra."""
    mlp = nn.Sequential(
        nn.Linear(in_width, 4 * in_width),
        nn.GELU(),
        nn.Linear(4 * in_width, out_width),
        nn.GELU(),
        nn.Linear(out_width, out_width),
    )
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
    return mlp


class PositionwiseConnector(nn.Module):
    """One module applied to each position independently.

    Args:
        projector: (*, in_width) -> (*, out_width).
    """

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def num_tokens(self, grid: Grid) -> int:
        """M = L."""
        return grid.length

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """X (I, L, in_width) -> (I, L, out_width)."""
        return self.projector(cast_for(x, self.projector))

    def shard_units(self) -> Sequence[nn.Module]:
        """No modules: the projector is sharded with the model's root unit."""
        return []


class MlpConnector(PositionwiseConnector):
    """The three-layer MLP of ML-Mamba's and Cobra's baselines, applied to each position.

    Args:
        in_width: width of the fused features.
        out_width: width of the language model.
        grid: unused; positions are processed independently.

    Source: ML-Mamba §3.3, Fig. 3.
    """

    def __init__(self, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__(fused_mlp(in_width, out_width))
