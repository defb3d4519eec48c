from __future__ import annotations

import functools

import pytest
import torch
from ssmvl_ml_mamba.connectors import msc_advanced, msc_basic
from torch import Tensor, nn
from torch.nn import functional as F

from ssmvl.connectors.projectors import MlpConnector
from ssmvl.connectors.scan_connector import ScanConnector
from ssmvl.errors import ShapeError
from ssmvl.interfaces import Grid, Paths
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.scans import bsm, csm

MIXER = functools.partial(Mamba2Mixer, d_state=4, head_dim=4)
GRID = Grid(1, 2, 3)


def test_mlp_has_the_published_shape() -> None:
    connector = MlpConnector(6, 8, GRID)
    shapes = {name: tuple(p.shape) for name, p in connector.named_parameters() if name.endswith("weight")}
    assert list(shapes.values()) == [(24, 6), (8, 24), (8, 8)]
    assert connector(torch.randn(2, 6, 6), GRID).shape == (2, connector.num_tokens(GRID), 8)


def written_out(connector: ScanConnector, x: Tensor, advanced: bool) -> Tensor:
    """Both connectors without loops or modules, except for the mixers."""
    paths = Paths.of(bsm(GRID))
    x = F.gelu(connector.stem[0](x))
    for layer in connector.layers:
        if advanced:
            x = x + layer.mixer(x, paths)
            h = F.layer_norm(x, x.shape[-1:], layer.mlp_norm.weight, layer.mlp_norm.bias)
            x = x + layer.mlp.w3(F.silu(layer.mlp.w1(h)) * layer.mlp.w2(h))
        else:
            normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * layer.norm.weight
            x = x + layer.mixer(normed, paths)
    norm, mlp = connector.projector
    h = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias) if advanced else norm(x)
    return mlp[4](F.gelu(mlp[2](F.gelu(mlp[0](h)))))


@pytest.mark.parametrize("advanced", [True, False])
def test_msc_equals_a_straight_line_rewrite(advanced: bool) -> None:
    connector = (msc_advanced if advanced else msc_basic)(6, 8, GRID, mixer=MIXER)
    for parameter in connector.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 6, 6)
    torch.testing.assert_close(connector(x, GRID), written_out(connector, x, advanced), atol=1e-5, rtol=1e-4)


def test_grid_may_differ_between_calls() -> None:
    connector = msc_advanced(6, 8, GRID, mixer=MIXER, scan_order=csm)
    for grid in (GRID, Grid(1, 3, 5), Grid(1, 1, 1)):
        assert connector(torch.randn(1, grid.length, 6), grid).shape == (1, connector.num_tokens(grid), 8)


def test_path_tables_are_not_in_the_state_dict() -> None:
    connector = msc_advanced(6, 8, GRID, mixer=MIXER)
    names = set(connector.state_dict())
    connector(torch.randn(1, 6, 6), GRID)
    assert set(connector.state_dict()) == names == {name for name, _ in connector.named_parameters()}


def test_a_mixer_with_the_wrong_number_of_paths_is_rejected() -> None:
    connector = msc_advanced(6, 8, GRID, mixer=lambda width, num_paths: MIXER(width, 1))
    with pytest.raises(ShapeError, match="num_paths=1 received 2 paths"):
        connector(torch.randn(1, 6, 6), GRID)
