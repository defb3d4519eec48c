"""MambaVLM's projector. Source: MambaVLM §3.2, eq. 6-8; eq. 8 as in the VSS block it cites (arXiv 2401.10166)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ssmvl.interfaces import Count, Grid, Paths, ScanOrderPart
from ssmvl.layers.linear import cast_for
from ssmvl.layers.paths import PathFolding, PathTables
from ssmvl.layers.selective import selective_arguments, selective_parameters
from ssmvl.ops.selective_scan import selective_scan
from ssmvl_mamba_vlm.scans import cross_stitch


class MambaProjector(nn.Module):
    """W3(LayerNorm(sum of H_k) * SiLU(W2 R)), where H_k is the SSM along path k over H = SiLU(DWConv(W1 R)).

    DWConv is a 3x3 depthwise convolution with the same weights for all maps. Each path has its own SSM (B, C, dt, A and
    D); all run as one selective scan of K groups. The inner width is that of R; the linear layers have a bias.

    Args:
        in_width: width of the fused features R.
        out_width: width of the language model.
        grid: the fusion's grid.
        scan_order: K paths over the grid.
        d_state: S.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        grid: Grid,
        *,
        scan_order: ScanOrderPart = cross_stitch,
        d_state: Count = 16,
    ) -> None:
        super().__init__()
        self.paths = PathTables(scan_order, grid)
        self.folding = PathFolding(self.paths.count, "own", "sum")
        self.w1 = nn.Linear(in_width, in_width)
        self.w2 = nn.Linear(in_width, in_width)
        self.conv2d = nn.Conv2d(in_width, in_width, 3, padding=1, groups=in_width)
        parameters = selective_parameters(in_width, self.folding.own, d_state=d_state, dt_rank=-(-in_width // 16))
        self.x_proj, self.dt_proj, self.A_log, self.D = parameters
        self.norm = nn.LayerNorm(in_width)
        self.w3 = nn.Linear(in_width, out_width)

    def num_tokens(self, grid: Grid) -> int:
        """M = L."""
        return grid.length

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """X (I, L, in_width) -> (I, L, out_width).

        Raises:
            ShapeError: the numbers of positions in x and in the grid differ.
        """
        paths = self.paths(grid, x.device)
        self.folding.check(x.shape[1], paths, None)
        x = cast_for(x, self.w1)
        h = self.w1(x)
        if len(h):  # skip the scan if there are no images
            h = self._scan(self._convolve(h, grid), paths)
        return self.w3(self.norm(h) * F.silu(self.w2(x)))

    def shard_units(self) -> Sequence[nn.Module]:
        """No modules: it is small compared with a language model block and is sharded with the model's root unit."""
        return []

    def _convolve(self, h: Tensor, grid: Grid) -> Tensor:
        """H (I, L, D) -> (I, L, D): the convolution of each map, then SiLU."""
        maps = h.reshape(-1, grid.rows, grid.columns, h.shape[-1]).permute(0, 3, 1, 2)
        return F.silu(self.conv2d(maps)).permute(0, 2, 3, 1).reshape(h.shape)

    def _scan(self, h: Tensor, paths: Paths) -> Tensor:
        """H (I, L, D) -> (I, L, D): the sum of the K scans, in raster order."""
        h = self.folding.fold(h, paths)
        y, _ = selective_scan(**selective_arguments(h, self.x_proj, self.dt_proj, self.A_log, self.D, self.folding.own))
        return self.folding.merge(self.folding.unfold(y, paths))
