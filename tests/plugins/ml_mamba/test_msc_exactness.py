"""`msc_advanced` compared with an independent straight-line rewrite of the connector, and the published sizes."""

from __future__ import annotations

import functools

import pytest
import torch
from naive_connectors import (
    Parameters,
    assert_same,
    causal_conv,
    gelu,
    layer_norm,
    linear,
    recurrence,
    silu,
    softplus,
    trained,
    under,
)
from ssmvl_ml_mamba.connectors import msc_advanced
from torch import Tensor

from ssmvl.connectors.projectors import MlpConnector
from ssmvl.interfaces import Grid
from ssmvl.layers.mamba2 import Mamba2Mixer

SIZE, HEAD, WIDTH = 5, 4, 8
INNER = 2 * WIDTH
HEADS, CHANNELS = INNER // HEAD, INNER + 2 * SIZE
MIXER = functools.partial(Mamba2Mixer, d_state=SIZE, head_dim=HEAD)


def one_pass(p: Parameters, k: int, xBC: Tensor, dt: Tensor) -> Tensor:
    """Path k from its convolution to the end of its recurrence, over inputs in path order. (I, L, E)."""
    own, heads = slice(k * CHANNELS, (k + 1) * CHANNELS), slice(k * HEADS, (k + 1) * HEADS)
    xBC = causal_conv(xBC, p["conv1d.weight"][own], p["conv1d.bias"][own])
    x, B, C = xBC[..., :INNER], xBC[..., INNER : INNER + SIZE], xBC[..., INNER + SIZE :]
    dt, A = softplus(dt + p["dt_bias"][heads]), -torch.exp(p["A_log"][heads])
    # One number per head, repeated for its channels and states.
    dt, A, D = (t.repeat_interleave(HEAD, dim=-1) for t in (dt, A, p["D"][heads]))
    return recurrence(x, dt, A[:, None].repeat(1, SIZE), B, C, D)


def gated_norm(p: Parameters, y: Tensor, z: Tensor) -> Tensor:
    gated = y * silu(z)
    return gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"]


def mixer(p: Parameters, x: Tensor) -> Tensor:
    projected = x @ p["in_proj.weight"].T
    z, xBC, dt = projected[..., :INNER], projected[..., INNER : INNER + CHANNELS], projected[..., INNER + CHANNELS :]
    forward = gated_norm(p, one_pass(p, 0, xBC, dt), z)
    backward = gated_norm(p, one_pass(p, 1, xBC.flip(1), dt.flip(1)).flip(1), z)
    return ((forward + backward) / 2) @ p["out_proj.weight"].T


def written_out(p: Parameters, x: Tensor) -> Tensor:
    x = gelu(linear(p, "stem.0", x))
    for layer in ("layers.0.", "layers.1."):
        x = x + mixer(under(p, f"{layer}mixer."), x)
        h = layer_norm(p, f"{layer}mlp_norm", x)
        h = silu(linear(p, f"{layer}mlp.w1", h)) * linear(p, f"{layer}mlp.w2", h)
        x = x + linear(p, f"{layer}mlp.w3", h)
    h = layer_norm(p, "projector.0", x)
    h = gelu(linear(p, "projector.1.0", h))
    return linear(p, "projector.1.4", gelu(linear(p, "projector.1.2", h)))


# Largest relative fp32 errors of a gradient in 16 draws on an AMD EPYC: 7e-6 for the rewrite, 1.2e-5 for the connector.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("grid", [Grid(1, 2, 3), Grid(1, 5, 3), Grid(1, 1, 7), Grid(1, 13, 11)])
def test_msc_advanced_equals_two_explicit_passes(grid: Grid, dtype: torch.dtype, tolerance: float) -> None:
    connector = trained(msc_advanced(6, WIDTH, grid, mixer=MIXER)).to(dtype)
    first, second = connector.layers[0].mixer.A_log.chunk(2)
    assert (first != second).all()
    assert_same(connector, written_out, torch.randn(2, grid.length, 6, dtype=dtype), grid, tolerance)


@pytest.mark.parametrize(("build", "count"), [(msc_advanced, 184_405_440), (MlpConnector, 47_789_568)])
def test_number_of_parameters_at_the_published_size(build: type, count: int) -> None:
    with torch.device("meta"):
        connector = build(2176, 2560, Grid(1, 27, 27))
    assert sum(p.numel() for p in connector.parameters()) == count
