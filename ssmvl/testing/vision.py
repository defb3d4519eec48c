"""Checks of encoders, fusions and connectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ssmvl.interfaces import Connector, Fusion, Grid, ImageSpec, VisionEncoder
from ssmvl.testing.common import (
    build,
    name_of,
    perturbed,
    require,
    require_equal,
    require_gradients,
    require_independent_rows,
    require_tensor,
    require_units,
    seeded,
)

IMAGES = 3
WIDTHS = MappingProxyType({"first": 6, "second": 10})
GRID, OTHER_GRID = Grid(1, 4, 6), Grid(1, 4, 4)


@seeded()
def check_encoder(encoder: Callable[[], nn.Module]) -> None:
    """Check that an encoder declares width, grid and input and maps uint8 (I, 3, S, S) to (I, N, D), image by image.

    Loads no weights. `check_encoder(functools.partial(my_encoder, image_size=64))`.

    Args:
        encoder: called without arguments; returns a module.

    Raises:
        ContractError: the encoder violates its contract; names the requirement, the position and the values.
    """
    name = name_of(encoder)
    built = build(encoder, VisionEncoder)
    _require_layout(name, built)
    spec = built.image_spec
    require(isinstance(spec, ImageSpec), f"{name}.image_spec must be an ImageSpec, is {spec!r}")
    pixels = torch.randint(256, (IMAGES, 3, spec.size, spec.size), dtype=torch.uint8)
    with torch.no_grad():
        features = built(pixels)
        require_tensor(name, features, IMAGES, built.grid.length, built.width)
        require_tensor(f"{name} of zero images", built(pixels[:0]), 0, built.grid.length, built.width)
        require_independent_rows(name, built, pixels)
    require(not features[0].equal(features[1]), f"{name} returns the same features for two different images")
    require_units(name, built)


@seeded()
def check_fusion(
    fusion: Callable[..., nn.Module], *, widths: Mapping[str, int] = WIDTHS, grid: Grid = OTHER_GRID
) -> None:
    """Check that a fusion returns (I, L, D), image by image, independent of the order of its input mapping.

    `check_fusion(functools.partial(MyFusion, order=["b", "a"]), widths={"a": 6, "b": 10})`.

    Args:
        fusion: called with `widths` and `grids`; returns a module.
        widths: widths of the encoders; set them if the fusion's options name encoders.
        grid: grid of all encoders.

    Raises:
        ContractError: the fusion violates its contract; names the requirement, the position and the values.
    """
    name = name_of(fusion)
    built = perturbed(build(fusion, Fusion, widths=dict(widths), grids=dict.fromkeys(widths, grid)))
    _require_layout(name, built)
    x = torch.randn(IMAGES, grid.length, sum(widths.values()))

    def features(x: Tensor) -> dict[str, Tensor]:
        return dict(zip(widths, x.split(list(widths.values()), dim=-1), strict=True))

    inputs = {encoder: part.requires_grad_() for encoder, part in features(x).items()}
    y = built(inputs)
    require_tensor(name, y, IMAGES, built.grid.length, built.width)
    require_tensor(f"{name} of zero images", built(features(x[:0])), 0, built.grid.length, built.width)
    what = f"{name} must select features by the encoders' names, not by the order of the mapping"
    require_equal(what, built(dict(reversed(inputs.items()))), y)
    require_independent_rows(name, lambda x: built(features(x)), x)
    require_gradients(name, built, y, inputs)


@seeded()
def check_connector(
    connector: Callable[..., nn.Module],
    *,
    in_width: int = 24,
    out_width: int = 64,
    grids: tuple[Grid, Grid] = (GRID, OTHER_GRID),
) -> None:
    """Check that a connector returns `num_tokens(grid)` tokens per image, image by image, on any grid, and trains.

    Its weights must not depend on the grid, so that they can be loaded for images of another size.
    `check_connector(functools.partial(my_connector, num_layers=1))`.

    Args:
        connector: called with `in_width`, `out_width` and `grid`; returns a module (I, L, in_width), grid -> (I, M, D).
        in_width: width of the features, if the connector needs a specific one.
        out_width: D, if the connector needs a specific one.
        grids: the connector is built for the first and called on both.

    Raises:
        ContractError: the connector violates its contract; names the requirement, the position and the values.
    """
    name = name_of(connector)
    built, other = (build(connector, Connector, in_width=in_width, out_width=out_width, grid=g) for g in grids)
    _check_weights(name, built, other, grids)
    perturbed(built)
    for grid in grids:
        x = torch.randn(IMAGES, grid.length, in_width, requires_grad=True)
        _check_tokens(f"{name} over grid {tuple(grid)}", built, x, grid, out_width)
    _check_weights(name, built, other, grids)  # again, because a call may have registered a buffer
    require_units(name, built)


def _check_tokens(where: str, built: Any, x: Tensor, grid: Grid, out_width: int) -> None:
    tokens, y = built.num_tokens(grid), built(x, grid)
    require_tensor(where, y, IMAGES, tokens, out_width)
    require_tensor(f"{where} of zero images", built(x[:0], grid), 0, tokens, out_width)
    require_independent_rows(where, lambda x: built(x, grid), x)
    require_gradients(where, built, y, {"its input": x})


def _check_weights(name: str, built: nn.Module, other: nn.Module, grids: tuple[Grid, Grid]) -> None:
    first, second = _shapes(built), _shapes(other)
    what = f"{name}: no entry of the state dict may depend on the grid"
    for key in sorted(first.keys() | second.keys()):
        shapes = f"{key} is {first.get(key)} for {tuple(grids[0])}, {second.get(key)} for {tuple(grids[1])}"
        require(first.get(key) == second.get(key), f"{what}; {shapes}")


def _require_layout(name: str, built: Any) -> None:
    positive = isinstance(built.width, int) and built.width > 0
    require(positive, f"{name}.width must be a positive integer, is {built.width!r}")
    require(isinstance(built.grid, Grid), f"{name}.grid must be a Grid(maps, rows, columns), is {built.grid!r}")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
