"""Mamba-1 only: one path against a reference, shapes, initialization. See test_mixers for tests of all mixers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssmvl.interfaces import Grid, Paths, ScanOrder
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.scans import bsm, csm, raster

SMALL = {"d_state": 5, "d_conv": 3, "dt_rank": 2}


def trained(mixer: Mamba1Mixer) -> Mamba1Mixer:
    """The mixer with every parameter perturbed, so that paths differ."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return mixer


def one_path(mixer: Mamba1Mixer, x: Tensor, path: Tensor, k: int) -> Tensor:
    """Reference for path k: gather, conv, recurrence, gather back; before the merge and the gate."""
    inner, size, rank = mixer.inner, mixer.d_state, mixer.dt_rank
    own, projected = slice(k * inner, (k + 1) * inner), rank + 2 * size
    u = (x @ mixer.in_proj.weight.T)[:, path, :inner]
    weight, bias = mixer.conv1d.weight[own], mixer.conv1d.bias[own]
    u = F.silu(F.conv1d(F.pad(u.transpose(1, 2), [weight.shape[-1] - 1, 0]), weight, bias, groups=inner))
    u = u.transpose(1, 2)
    low, B, C = (u @ mixer.x_proj.weight[k * projected : (k + 1) * projected].T).split([rank, size, size], -1)
    dt = F.softplus(low @ mixer.dt_proj.weight[own].T + mixer.dt_proj.bias[own])
    A, D = -mixer.A_log[own].exp(), mixer.D[own]
    h = torch.zeros(len(x), inner, size, dtype=x.dtype)
    y = torch.empty_like(u)
    for t in range(x.shape[1]):
        h = h * (dt[:, t, :, None] * A).exp() + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        y[:, t] = (h * C[:, t, None]).sum(-1) + D * u[:, t]
    back = torch.empty_like(y)
    back[:, path] = y
    return back


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("order", "merge"), [(raster, "mean"), (bsm, "mean"), (csm, "mean"), (bsm, "sum")])
def test_paths_equal_the_reference(order: ScanOrder, merge: str, own: bool) -> None:
    paths = order(Grid(1, 2, 3))
    mixer = Mamba1Mixer(8, len(paths), merge=merge, path_parameters="own" if own else "shared", **SMALL)
    mixer, x = trained(mixer), torch.randn(2, 6, 8)
    each = torch.stack([one_path(mixer, x, path, k if own else 0) for k, path in enumerate(paths)])
    merged = each.mean(0) if merge == "mean" else each.sum(0)
    gate = F.silu((x @ mixer.in_proj.weight.T)[..., mixer.inner :])
    torch.testing.assert_close(
        mixer(x, Paths.of(paths)), (merged * gate) @ mixer.out_proj.weight.T, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("length", [1, 2, 5, 70])
@torch.no_grad()
def test_sequences_of_any_length_equal_the_recurrence(length: int) -> None:
    mixer, x = trained(Mamba1Mixer(8, **SMALL)), torch.randn(2, length, 8)
    gate = F.silu((x @ mixer.in_proj.weight.T)[..., mixer.inner :])
    expected = (one_path(mixer, x, torch.arange(length), 0) * gate) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("parameters", "count"), [("own", 3), ("shared", 1)])
def test_shapes(parameters: str, count: int) -> None:
    mixer = Mamba1Mixer(8, 3, path_parameters=parameters, **SMALL)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "in_proj.weight": (32, 8),
        "conv1d.weight": (count * 16, 1, 3),
        "conv1d.bias": (count * 16,),
        "x_proj.weight": (count * (2 + 2 * 5), 16),
        "dt_proj.weight": (count * 16, 2),
        "dt_proj.bias": (count * 16,),
        "A_log": (count * 16, 5),
        "D": (count * 16,),
        "out_proj.weight": (8, 16),
    }
    state = Mamba1Mixer(8, **SMALL).new_state(7)
    assert (state.conv.shape, state.ssm.shape) == ((7, 2, 16), (7, 16, 5))


@pytest.mark.parametrize(("width", "rank"), [(8, 1), (16, 1), (17, 2), (768, 48)])
def test_the_default_dt_rank_is_a_sixteenth_of_the_width(width: int, rank: int) -> None:
    assert Mamba1Mixer(width).dt_proj.in_features == rank


def test_initial_rates_and_step_sizes() -> None:
    mixer = Mamba1Mixer(64, 2, d_state=6)
    assert torch.equal(mixer.D, torch.ones(256))
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 7).expand(256, 6))
    dt = F.softplus(mixer.dt_proj.bias)
    assert 0.00099 < dt.min() < 0.005
    assert 0.02 < dt.max() < 0.1001
    first, second = mixer.dt_proj.bias.chunk(2)
    assert torch.equal(first, second)
    assert mixer.dt_proj.weight.abs().max() <= 4**-0.5
