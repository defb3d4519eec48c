"""Connector blocks written out position by position, without code of the ops or layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from ssmvl.interfaces import Grid

Parameters = Mapping[str, Tensor]
Path = Sequence[int]


@torch.no_grad()
def trained(connector: nn.Module) -> nn.Module:
    """The connector with every parameter perturbed, so that paths differ and no bias is zero."""
    for parameter in connector.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return connector


def assert_same(
    connector: nn.Module, written_out: Callable[[Parameters, Tensor], Tensor], x: Tensor, grid: Grid, tolerance: float
) -> None:
    """Check that values and gradients of the input and all parameters equal those of the rewrite in fp64.

    `tolerance` is relative to the largest expected value.
    """
    x.requires_grad_()
    names, parameters = zip(*connector.named_parameters(), strict=True)
    actual = connector(x, grid)
    expected = written_out({name: p.double() for name, p in connector.named_parameters()}, x.double())
    weight = torch.randn_like(expected)
    both = [[y, *torch.autograd.grad((y * weight.to(y.dtype)).sum(), [x, *parameters])] for y in (actual, expected)]
    for name, one, other in zip(("the output", "the input", *names), *both, strict=True):
        error = float((one.double() - other).abs().max() / other.double().abs().max())
        assert error <= tolerance, f"{name}: {error:.1e}"


def under(parameters: Parameters, prefix: str) -> Parameters:
    """The parameters whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}


def linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def layer_norm(p: Parameters, name: str, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X (I, L, C), weight (C, 1, W) -> SiLU of the causal depthwise convolution."""
    taps = weight.shape[-1]
    ys = []
    for t in range(x.shape[1]):
        inputs = [(tap, t + tap - taps + 1) for tap in range(taps)]
        ys.append(bias + sum(weight[:, 0, tap] * x[:, position] for tap, position in inputs if position >= 0))
    return silu(torch.stack(ys, 1))


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """H = exp(dt A) h + dt B x, y = C h + D x. X, dt (I, L, E), A (E, S), B, C (I, L, S), D (E,) -> (I, L, E)."""
    h = torch.zeros(len(x), *A.shape, dtype=x.dtype)
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + D * x[:, t])
    return torch.stack(ys, 1)


def selective_scan(p: Parameters, x: Tensor) -> Tensor:
    """Mamba-1's SSM of one path over x (I, L, E)."""
    inner, size = p["A_log"].shape
    rank = p["dt_proj.weight"].shape[1]
    projected = x @ p["x_proj.weight"].T
    low, B, C = projected[..., :rank], projected[..., rank : rank + size], projected[..., rank + size :]
    assert (x.shape[-1], C.shape[-1]) == (inner, size)
    return recurrence(x, softplus(linear(p, "dt_proj", low)), -torch.exp(p["A_log"]), B, C, p["D"])


def mamba1(p: Parameters, x: Tensor) -> Tensor:
    """A complete Mamba-1 layer over x (I, L, D) in its given order."""
    projected = x @ p["in_proj.weight"].T
    inner = projected.shape[-1] // 2
    u = causal_conv(projected[..., :inner], p["conv1d.weight"], p["conv1d.bias"])
    return (selective_scan(p, u) * silu(projected[..., inner:])) @ p["out_proj.weight"].T


def read(x: Tensor, path: Path) -> Tensor:
    """X (I, L, D) in path order."""
    return torch.stack([x[:, position] for position in path], 1)


def put_back(y: Tensor, path: Path) -> Tensor:
    """Y in path order -> raster order."""
    step_of = {position: step for step, position in enumerate(path)}
    return torch.stack([y[:, step_of[position]] for position in range(len(path))], 1)


def raster_index(grid: Grid, m: int, row: int, column: int) -> int:
    return (m * grid.rows + row) * grid.columns + column


def bidirectional(grid: Grid) -> list[Path]:
    """Map by map and row by row, and the reverse."""
    ranges = range(grid.maps), range(grid.rows), range(grid.columns)
    forward = [raster_index(grid, m, row, column) for m, row, column in product(*ranges)]
    return [forward, forward[::-1]]


def cross_cells(grid: Grid) -> list[list[tuple[int, int]]]:
    """The four cross-scan orders over one map, as (row, column) pairs."""
    by_rows = [(row, column) for row in range(grid.rows) for column in range(grid.columns)]
    by_columns = [(row, column) for column in range(grid.columns) for row in range(grid.rows)]
    return [by_rows, by_rows[::-1], by_columns, by_columns[::-1]]


def cross_cat(grid: Grid) -> list[Path]:
    """One map after the other, each in the cross-scan orders."""
    return [[raster_index(grid, m, *cell) for m in range(grid.maps) for cell in cells] for cells in cross_cells(grid)]


def cross_stitch(grid: Grid) -> list[Path]:
    """The cross-scan orders with the maps interleaved at every step."""
    return [[raster_index(grid, m, *cell) for cell in cells for m in range(grid.maps)] for cells in cross_cells(grid)]
