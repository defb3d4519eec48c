"""Generic connector that scans the grid along the paths of a scan order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ssmvl.interfaces import Grid
from ssmvl.layers.block import Block
from ssmvl.layers.linear import cast_for
from ssmvl.layers.paths import PathTables

__all__ = ["ScanConnector"]


class ScanConnector(nn.Module):
    """stem -> blocks, each of which scans along all paths -> projector.

    Args:
        stem: (*, in_width) -> (*, D); may be `nn.Identity()`.
        blocks: residual blocks of width D whose mixers have `paths.count` paths.
        projector: (*, D) -> (*, out_width), including the final norm if there is one.
        paths: the paths of a scan order.
    """

    def __init__(self, *, stem: nn.Module, blocks: Sequence[Block], projector: nn.Module, paths: PathTables) -> None:
        super().__init__()
        self.stem = stem
        self.layers = nn.ModuleList(blocks)
        self.projector = projector
        self.paths = paths

    def num_tokens(self, grid: Grid) -> int:
        """M = L."""
        return grid.length

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """X (I, L, in_width) -> (I, L, out_width)."""
        paths = self.paths(grid, x.device)
        x = self.stem(cast_for(cast_for(x, self.projector), self.stem))
        for block in self.layers if len(x) else ():  # skip the scan if there are no images
            x = block(x, paths)
        return self.projector(x)

    def shard_units(self) -> Sequence[nn.Module]:
        """Each block."""
        return list(self.layers)
