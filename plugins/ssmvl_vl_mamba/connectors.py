"""VL-Mamba's multimodal connectors. Source: VL-Mamba §3.2, Fig. 2 and eq. 5-6; no code was released.

VSS, the vision selective scan, is one Mamba-1 layer that runs along all paths of a scan order with shared weights; the
results are averaged in raster order.
"""

from __future__ import annotations

import functools

from torch import nn

from ssmvl.connectors.projectors import PositionwiseConnector
from ssmvl.connectors.scan_connector import ScanConnector
from ssmvl.interfaces import Grid, MixerPart, ScanOrderPart
from ssmvl.layers.block import Block
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.paths import PathTables
from ssmvl.scans import bsm

MAMBA_LAYER = functools.partial(Mamba1Mixer, path_parameters="shared")


def vlmamba_mlp(in_width: int, out_width: int, grid: Grid) -> PositionwiseConnector:
    """V_out = MLP(V_img): Linear(in_width -> out_width), GELU, Linear(-> out_width).

    Args:
        in_width: width of the features.
        out_width: width of the language model and of the hidden layer.
        grid: unused; positions are processed independently.
    """
    return PositionwiseConnector(_mlp(in_width, out_width))


def vss_mlp(
    in_width: int, out_width: int, grid: Grid, *, scan_order: ScanOrderPart = bsm, mixer: MixerPart = MAMBA_LAYER
) -> ScanConnector:
    """V_out = MLP(LayerNorm(VSS(V_img) + V_img)), eq. 5, with the MLP of `vlmamba_mlp`.

    Args:
        in_width: width of the features and of the VSS.
        out_width: width of the language model.
        grid: the fusion's grid.
        scan_order: K paths over the grid.
        mixer: built with `num_paths` = K. Setting it replaces the whole default, including `path_parameters: shared`.
    """
    paths = PathTables(scan_order, grid)
    return ScanConnector(
        stem=nn.Identity(),
        blocks=[Block(mixer(width=in_width, num_paths=paths.count))],
        projector=nn.Sequential(nn.LayerNorm(in_width), _mlp(in_width, out_width)),
        paths=paths,
    )


def vss_l2(
    in_width: int, out_width: int, grid: Grid, *, scan_order: ScanOrderPart = bsm, mixer: MixerPart = MAMBA_LAYER
) -> ScanConnector:
    """V' = Linear(V_img); V_out = Linear(LayerNorm(VSS(GELU(V')) + V')), eq. 6, as in the final model.

    Args:
        in_width: width of the features.
        out_width: width of the language model, of V' and of the VSS.
        grid: the fusion's grid.
        scan_order: K paths over the grid.
        mixer: built with `num_paths` = K. Setting it replaces the whole default, including `path_parameters: shared`.
    """
    paths = PathTables(scan_order, grid)
    # GELU takes the place of the norm: it applies to the mixer's input, not to the residual.
    block = Block(mixer(width=out_width, num_paths=paths.count), norm=nn.GELU())
    return ScanConnector(
        stem=nn.Linear(in_width, out_width),
        blocks=[block],
        projector=nn.Sequential(nn.LayerNorm(out_width), nn.Linear(out_width, out_width)),
        paths=paths,
    )


def _mlp(in_width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
