"""ML-Mamba's Mamba-2 scan connectors. Source: arXiv 2407.19832, Fig. 3 and eq. 6-9; widths as in the released code."""

from __future__ import annotations

from torch import nn

from ssmvl.connectors.projectors import fused_mlp
from ssmvl.connectors.scan_connector import ScanConnector
from ssmvl.interfaces import Depth, Grid, MixerPart, ScanOrderPart
from ssmvl.layers.block import Block, scale_residual
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.layers.mlp import SwiGLU
from ssmvl.layers.norm import RMSNorm
from ssmvl.layers.paths import PathTables
from ssmvl.scans import bsm


def msc_basic(
    in_width: int,
    out_width: int,
    grid: Grid,
    *,
    scan_order: ScanOrderPart = bsm,
    mixer: MixerPart = Mamba2Mixer,
    num_layers: Depth = 2,
) -> ScanConnector:
    """V_out = MLP(MSC(V_img)): pre-norm residual blocks without MLPs, RMSNorm, the three-layer MLP.

    Args:
        in_width: width of the fused features.
        out_width: width of the language model and of the blocks.
        grid: the fusion's grid.
        scan_order: K paths over the grid.
        mixer: built with `num_paths` = K.
        num_layers: number of blocks.
    """
    paths = PathTables(scan_order, grid)
    blocks = [Block(mixer(width=out_width, num_paths=paths.count), norm=RMSNorm(out_width)) for _ in range(num_layers)]
    return _connector(in_width, out_width, blocks, RMSNorm(out_width), paths)


def msc_advanced(
    in_width: int,
    out_width: int,
    grid: Grid,
    *,
    scan_order: ScanOrderPart = bsm,
    mixer: MixerPart = Mamba2Mixer,
    num_layers: Depth = 2,
) -> ScanConnector:
    """V_out = MLP(SwiGLU(MSC(V_img))), as in the final model: no norm before the mixer, LayerNorm before each SwiGLU.

    Args:
        in_width: width of the fused features.
        out_width: width of the language model and of the blocks.
        grid: the fusion's grid.
        scan_order: K paths over the grid.
        mixer: built with `num_paths` = K.
        num_layers: number of blocks.
    """
    paths = PathTables(scan_order, grid)
    blocks = [
        Block(mixer(width=out_width, num_paths=paths.count), mlp=SwiGLU(out_width), mlp_norm=nn.LayerNorm(out_width))
        for _ in range(num_layers)
    ]
    return _connector(in_width, out_width, blocks, nn.LayerNorm(out_width), paths)


def _connector(in_width: int, out_width: int, blocks: list[Block], norm: nn.Module, paths: PathTables) -> ScanConnector:
    scale_residual(blocks, len(blocks))
    return ScanConnector(
        stem=nn.Sequential(nn.Linear(in_width, out_width), nn.GELU()),
        blocks=blocks,
        projector=nn.Sequential(norm, fused_mlp(out_width, out_width)),
        paths=paths,
    )
