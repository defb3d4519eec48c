from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import ssmvl_vl_mamba
import torch
from naive_connectors import (
    Parameters,
    Path,
    assert_same,
    bidirectional,
    cross_cat,
    gelu,
    layer_norm,
    linear,
    mamba1,
    put_back,
    read,
    trained,
    under,
)
from ssmvl_vl_mamba.connectors import vlmamba_mlp, vss_l2, vss_mlp
from torch import Tensor

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Grid
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.recipes.binding import bind_part
from ssmvl.scans import bsm, csm
from ssmvl.testing import check_connector

GRID = Grid(1, 2, 3)


def vss(p: Parameters, x: Tensor, paths: list[Path]) -> Tensor:
    """The complete layer over each path, back in raster order, averaged."""
    return sum(put_back(mamba1(under(p, "layers.0.mixer."), read(x, path)), path) for path in paths) / len(paths)


def vss_mlp_written_out(paths: list[Path], p: Parameters, x: Tensor) -> Tensor:
    h = layer_norm(p, "projector.0", vss(p, x, paths) + x)
    return linear(p, "projector.1.2", gelu(linear(p, "projector.1.0", h)))


def vss_l2_written_out(paths: list[Path], p: Parameters, x: Tensor) -> Tensor:
    x = linear(p, "stem", x)
    return linear(p, "projector.1", layer_norm(p, "projector.0", vss(p, gelu(x), paths) + x))


@pytest.mark.parametrize("grid", [GRID, Grid(1, 5, 3), Grid(1, 1, 7), Grid(1, 7, 1), Grid(1, 13, 11)])
@pytest.mark.parametrize(("build", "written_out"), [(vss_mlp, vss_mlp_written_out), (vss_l2, vss_l2_written_out)])
@pytest.mark.parametrize(("options", "paths"), [({}, bidirectional), ({"scan_order": csm}, cross_cat)])
def test_vss_equals_naive_loops_forward_and_backward(
    build: Callable[..., Any],
    written_out: Callable[..., Tensor],
    options: dict[str, Any],
    paths: Callable[[Grid], list[Path]],
    grid: Grid,
) -> None:
    connector = trained(build(6, 10, grid, **options)).double()
    x = torch.randn(2, grid.length, 6, dtype=torch.float64)
    assert_same(connector, functools.partial(written_out, paths(grid)), x, grid, 1e-9)


def test_vlmamba_mlp_equals_a_straight_line_rewrite() -> None:
    connector = trained(vlmamba_mlp(6, 10, GRID)).double()
    shapes = [tuple(p.shape) for name, p in connector.named_parameters() if name.endswith("weight")]
    assert shapes == [(10, 6), (10, 10)]

    def written_out(p: Parameters, x: Tensor) -> Tensor:
        return linear(p, "projector.2", gelu(linear(p, "projector.0", x)))

    assert_same(connector, written_out, torch.randn(2, 6, 6, dtype=torch.float64), GRID, 1e-12)


@pytest.mark.parametrize(
    ("build", "count"),
    [(vlmamba_mlp, 9_507_840), (vss_mlp, 17_931_264), (vss_l2, 50_754_560)],
)
@pytest.mark.parametrize("order", [bsm, csm])
def test_number_of_parameters_from_siglip_to_mamba(build: Callable[..., Any], count: int, order: Any) -> None:
    """The expected number is computed by hand; paths share the mixer, so it does not depend on the scan order."""
    options = {} if build is vlmamba_mlp else {"scan_order": order}
    with torch.device("meta"):
        connector = build(1152, 2560, Grid(1, 27, 27), **options)
    assert sum(p.numel() for p in connector.parameters()) == count


@pytest.mark.parametrize(("build", "width"), [(vss_mlp, 6), (vss_l2, 10)])
def test_the_vision_scan_is_one_mamba_layer(build: Callable[..., Any], width: int) -> None:
    (block,) = build(6, 10, GRID).layers
    assert isinstance(block.mixer, Mamba1Mixer)
    assert (block.mixer.conv1d.weight.shape, block.mixer.A_log.shape) == ((2 * width, 1, 4), (2 * width, 16))


@pytest.mark.parametrize("build", [vlmamba_mlp, vss_mlp, vss_l2, functools.partial(vss_l2, scan_order=csm)])
def test_conforms(build: Callable[..., Any]) -> None:
    check_connector(build)
    check_connector(build, in_width=20, grids=(Grid(2, 3, 5), Grid(1, 1, 1)))


@pytest.mark.parametrize("build", [vlmamba_mlp, vss_mlp, vss_l2])
@pytest.mark.parametrize("images", [0, 2])
def test_the_input_is_cast_to_the_weights(build: Callable[..., Any], images: int) -> None:
    connector, x = build(6, 10, GRID).double(), torch.randn(images, 6, 6).bfloat16()
    y = connector(x, GRID)
    assert (y.dtype, y.shape) == (torch.float64, (images, 6, 10))
    assert torch.equal(y, connector(x.double(), GRID))


@pytest.mark.parametrize("build", [vss_mlp, vss_l2])
def test_a_wrong_number_of_positions_is_rejected(build: Callable[..., Any]) -> None:
    with pytest.raises(ShapeError, match=r"paths must have shape \(2, 5\) for this input, received \(2, 6\)"):
        build(6, 10, GRID)(torch.randn(1, 5, 6), GRID)


@pytest.mark.parametrize("name", ["vss_mlp", "vss_l2"])
def test_options_of_a_recipe(name: str) -> None:
    mixer = {"name": "mamba1", "d_state": 4, "path_parameters": "own"}
    bound, problems = bind_part({"name": name, "scan_order": "csm", "mixer": mixer}, "connector", "model.connector")
    assert problems == []
    connector = bound(in_width=8, out_width=8, grid=GRID)
    assert connector.layers[0].mixer.A_log.shape == (4 * 16, 4)


def test_the_hook_registers_the_connectors() -> None:
    registered: list[tuple[Any, ...]] = []
    ssmvl_vl_mamba.ssmvl_register(lambda *entry: registered.append(entry))
    names = ["vlmamba_mlp", "vss_mlp", "vss_l2"]
    assert registered == [("connector", name, f"ssmvl_vl_mamba.connectors:{name}") for name in names]
