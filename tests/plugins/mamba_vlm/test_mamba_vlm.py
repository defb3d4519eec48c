from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import ssmvl_mamba_vlm
import torch
from naive_connectors import (
    Parameters,
    Path,
    assert_same,
    layer_norm,
    linear,
    put_back,
    raster_index,
    read,
    selective_scan,
    silu,
    trained,
)
from naive_connectors import cross_cat as naive_cross_cat
from naive_connectors import cross_stitch as naive_cross_stitch
from ssmvl_mamba_vlm.connectors import MambaProjector
from ssmvl_mamba_vlm.scans import cross_cat, cross_stitch
from torch import Tensor

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Grid, ScanOrder
from ssmvl.ops.reorder import path_table
from ssmvl.recipes.binding import bind_part
from ssmvl.scans import csm
from ssmvl.testing import check_connector, check_scan_order

GRID = Grid(2, 2, 3)
ORDERS = {cross_cat: naive_cross_cat, cross_stitch: naive_cross_stitch}


def test_cross_cat_over_2x2x3() -> None:
    """Map 1 is 0 1 2 / 3 4 5, map 2 is 6 7 8 / 9 10 11."""
    assert cross_cat(GRID).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        [5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6],
        [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11],
        [5, 2, 4, 1, 3, 0, 11, 8, 10, 7, 9, 6],
    ]


def test_cross_stitch_over_2x2x3() -> None:
    assert cross_stitch(GRID).tolist() == [
        [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11],
        [5, 11, 4, 10, 3, 9, 2, 8, 1, 7, 0, 6],
        [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11],
        [5, 11, 2, 8, 4, 10, 1, 7, 3, 9, 0, 6],
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_orders_equal_naive_loops(order: ScanOrder) -> None:
    sides = [(1, 1), (1, 7), (7, 1), (2, 3), (3, 2), (5, 3), (4, 4), (13, 11)]
    for maps in (1, 2, 3):
        for rows, columns in sides:
            grid = Grid(maps, rows, columns)
            assert path_table(order, grid).tolist() == ORDERS[order](grid), grid


@pytest.mark.parametrize("order", ORDERS)
def test_orders_conform(order: ScanOrder) -> None:
    check_scan_order(order)
    assert order(Grid(1, 3, 5)).equal(csm(Grid(1, 3, 5)))


def convolved(p: Parameters, h: Tensor, grid: Grid) -> Tensor:
    """The zero-padded 3x3 depthwise convolution of each map, cell by cell, then SiLU."""
    ys = []
    for m in range(grid.maps):
        for row in range(grid.rows):
            for column in range(grid.columns):
                y = p["conv2d.bias"].expand(len(h), -1)
                for i in range(max(row - 1, 0), min(row + 2, grid.rows)):
                    for j in range(max(column - 1, 0), min(column + 2, grid.columns)):
                        tap = p["conv2d.weight"][:, 0, i - row + 1, j - column + 1]
                        y = y + tap * h[:, raster_index(grid, m, i, j)]
                ys.append(silu(y))
    return torch.stack(ys, 1)


def path_parameters(p: Parameters, k: int, count: int) -> Parameters:
    """The SSM parameters of path k."""
    own = ("x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D")
    return {name: p[name].chunk(count)[k] for name in own}


def written_out(grid: Grid, paths: list[Path], p: Parameters, x: Tensor) -> Tensor:
    h = convolved(p, linear(p, "w1", x), grid)
    merged = torch.zeros_like(h)
    for k, path in enumerate(paths):
        merged = merged + put_back(selective_scan(path_parameters(p, k, len(paths)), read(h, path)), path)
    return linear(p, "w3", layer_norm(p, "norm", merged) * silu(linear(p, "w2", x)))


@pytest.mark.parametrize(
    "grid", [GRID, Grid(2, 5, 3), Grid(2, 1, 4), Grid(2, 3, 1), Grid(1, 3, 3), Grid(3, 2, 5), Grid(2, 7, 9)]
)
@pytest.mark.parametrize(
    ("options", "paths"),
    [({}, naive_cross_stitch), ({"scan_order": cross_cat}, naive_cross_cat), ({"d_state": 3}, naive_cross_stitch)],
)
def test_projector_equals_naive_loops_forward_and_backward(
    options: dict[str, Any], paths: Callable[[Grid], list[Path]], grid: Grid
) -> None:
    connector = trained(MambaProjector(18, 5, grid, **options)).double()
    for parameter in (connector.dt_proj.bias, connector.A_log, connector.D):
        first, *others = parameter.chunk(4)
        assert all((first != other).all() for other in others)
    x = torch.randn(2, grid.length, 18, dtype=torch.float64)
    assert_same(connector, functools.partial(written_out, grid, paths(grid)), x, grid, 1e-9)


def test_shapes() -> None:
    connector = MambaProjector(18, 5, GRID, d_state=3)
    assert {name: tuple(p.shape) for name, p in connector.named_parameters()} == {
        "w1.weight": (18, 18),
        "w1.bias": (18,),
        "w2.weight": (18, 18),
        "w2.bias": (18,),
        "conv2d.weight": (18, 1, 3, 3),
        "conv2d.bias": (18,),
        "x_proj.weight": (4 * (2 + 2 * 3), 18),
        "dt_proj.weight": (4 * 18, 2),
        "dt_proj.bias": (4 * 18,),
        "A_log": (4 * 18, 3),
        "D": (4 * 18,),
        "norm.weight": (18,),
        "norm.bias": (18,),
        "w3.weight": (5, 18),
        "w3.bias": (5,),
    }


def test_number_of_parameters_at_the_published_size() -> None:
    """The expected number is computed by hand from the widths, with S = 16."""
    with torch.device("meta"):
        connector = MambaProjector(1152, 2560, Grid(2, 27, 27))
    assert sum(p.numel() for p in connector.parameters()) == 6_515_968


@pytest.mark.parametrize("order", [cross_stitch, cross_cat, csm])
def test_conforms(order: ScanOrder) -> None:
    projector = functools.partial(MambaProjector, scan_order=order)
    check_connector(projector)
    check_connector(projector, grids=(Grid(2, 3, 5), Grid(1, 1, 1)))


@pytest.mark.parametrize("images", [0, 2])
def test_the_input_is_cast_to_the_weights(images: int) -> None:
    connector, x = MambaProjector(6, 10, GRID).double(), torch.randn(images, 12, 6).bfloat16()
    y = connector(x, GRID)
    assert (y.dtype, y.shape) == (torch.float64, (images, connector.num_tokens(GRID), 10))
    assert torch.equal(y, connector(x.double(), GRID))


@pytest.mark.parametrize(("positions", "grid"), [(11, GRID), (12, Grid(1, 2, 3)), (6, GRID)])
def test_a_wrong_number_of_positions_is_rejected(positions: int, grid: Grid) -> None:
    message = rf"paths must have shape \(4, {positions}\) for this input, received \(4, {grid.length}\)"
    with pytest.raises(ShapeError, match=message):
        MambaProjector(6, 10, GRID)(torch.randn(1, positions, 6), grid)


def test_options_of_a_recipe() -> None:
    node = {"name": "mamba_projector", "scan_order": "cross_cat", "d_state": 4}
    bound, problems = bind_part(node, "connector", "model.connector")
    assert problems == []
    connector = bound(in_width=8, out_width=8, grid=GRID)
    assert connector.A_log.shape == (4 * 8, 4)
    assert connector.paths(GRID, torch.device("cpu")).order.equal(cross_cat(GRID))


def test_the_hook_registers_orders_and_projector() -> None:
    registered: list[tuple[Any, ...]] = []
    ssmvl_mamba_vlm.ssmvl_register(lambda *entry: registered.append(entry))
    assert registered == [
        ("scan_order", "cross_cat", "ssmvl_mamba_vlm.scans:cross_cat"),
        ("scan_order", "cross_stitch", "ssmvl_mamba_vlm.scans:cross_stitch"),
        ("connector", "mamba_projector", "ssmvl_mamba_vlm.connectors:MambaProjector"),
    ]
