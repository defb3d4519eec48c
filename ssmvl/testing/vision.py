"""The checks of what lies between an image and its visual tokens: encoders, fusions and connectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ssmvl.interfaces import Connector, Fusion, Grid, ImageSpec, VisionEncoder
from ssmvl.testing.common import (
    build,
    moved,
    name_of,
    require,
    require_apart,
    require_equal,
    require_gradients,
    require_tensor,
    require_units,
    seeded,
)

IMAGES = 3
WIDTHS = MappingProxyType({"first": 6, "second": 10})
GRID, OTHER_GRID = Grid(1, 4, 6), Grid(1, 4, 4)


@seeded()
def check_encoder(encoder: Callable[[], nn.Module]) -> None:
    """The encoder says its width, grid and input, and gives (I, N, D) of uint8 (I, 3, S, S), each image alone.

    No weights are loaded. `check_encoder(functools.partial(my_encoder, image_size=64))`.

    Args:
        encoder: called with nothing; gives a module.

    Raises:
        ContractError: it does not; names the claim, the place and the values.
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
        require_tensor(f"{name} of no image", built(pixels[:0]), 0, built.grid.length, built.width)
        require_apart(name, built, pixels)
    require(not features[0].equal(features[1]), f"{name} gives the same features for two different images")
    require_units(name, built)


@seeded()
def check_fusion(
    fusion: Callable[..., nn.Module], *, widths: Mapping[str, int] = WIDTHS, grid: Grid = OTHER_GRID
) -> None:
    """The fusion of encoders of one grid gives (I, L, D), each image alone, whatever the order of its argument.

    `check_fusion(functools.partial(MyFusion, order=["b", "a"]), widths={"a": 6, "b": 10})`.

    Args:
        fusion: called with `widths` and `grids`; gives a module.
        widths: of the encoders, where the options name some.
        grid: of the encoders.

    Raises:
        ContractError: it does not; names the claim, the place and the values.
    """
    name = name_of(fusion)
    built = moved(build(fusion, Fusion, widths=dict(widths), grids=dict.fromkeys(widths, grid)))
    _require_layout(name, built)
    x = torch.randn(IMAGES, grid.length, sum(widths.values()))

    def features(x: Tensor) -> dict[str, Tensor]:
        return dict(zip(widths, x.split(list(widths.values()), dim=-1), strict=True))

    apart = {encoder: part.requires_grad_() for encoder, part in features(x).items()}
    y = built(apart)
    require_tensor(name, y, IMAGES, built.grid.length, built.width)
    require_tensor(f"{name} of no image", built(features(x[:0])), 0, built.grid.length, built.width)
    what = f"{name} must go by the encoders' names, not by the order in which they come"
    require_equal(what, built(dict(reversed(apart.items()))), y)
    require_apart(name, lambda x: built(features(x)), x)
    require_gradients(name, built, y, apart)


@seeded()
def check_connector(
    connector: Callable[..., nn.Module],
    *,
    in_width: int = 24,
    out_width: int = 64,
    grids: tuple[Grid, Grid] = (GRID, OTHER_GRID),
) -> None:
    """The connector gives `num_tokens(grid)` tokens of each image alone, over any grid, and can be trained.

    Built for another grid it has the same weights, so that they can be loaded for images of another size.
    `check_connector(functools.partial(my_connector, num_layers=1))`.

    Args:
        connector: called with `in_width`, `out_width` and `grid`; gives a module (I, L, in_width), grid -> (I, M, D).
        in_width: of the features, where the connector needs a certain one.
        out_width: D, likewise.
        grids: it is built for the first and called over both.

    Raises:
        ContractError: it does not; names the claim, the place and the values.
    """
    name = name_of(connector)
    built, other = (build(connector, Connector, in_width=in_width, out_width=out_width, grid=g) for g in grids)
    _check_weights(name, built, other, grids)
    moved(built)
    for grid in grids:
        x = torch.randn(IMAGES, grid.length, in_width, requires_grad=True)
        _check_tokens(f"{name} over grid {tuple(grid)}", built, x, grid, out_width)
    _check_weights(name, built, other, grids)  # a table may have been registered in a call
    require_units(name, built)


def _check_tokens(where: str, built: Any, x: Tensor, grid: Grid, out_width: int) -> None:
    tokens, y = built.num_tokens(grid), built(x, grid)
    require_tensor(where, y, IMAGES, tokens, out_width)
    require_tensor(f"{where} of no image", built(x[:0], grid), 0, tokens, out_width)
    require_apart(where, lambda x: built(x, grid), x)
    require_gradients(where, built, y, {"its input": x})


def _check_weights(name: str, built: nn.Module, other: nn.Module, grids: tuple[Grid, Grid]) -> None:
    mine, theirs = _shapes(built), _shapes(other)
    what = f"{name}: no entry of the state dict may depend on the grid"
    for key in sorted(mine.keys() | theirs.keys()):
        found = f"{key} is {mine.get(key)} for {tuple(grids[0])}, {theirs.get(key)} for {tuple(grids[1])}"
        require(mine.get(key) == theirs.get(key), f"{what}; {found}")


def _require_layout(name: str, built: Any) -> None:
    require(isinstance(built.width, int) and built.width > 0, f"{name}.width must be a count, is {built.width!r}")
    require(isinstance(built.grid, Grid), f"{name}.grid must be a Grid(maps, rows, columns), is {built.grid!r}")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
