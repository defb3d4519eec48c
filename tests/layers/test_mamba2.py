"""Mamba-2 only: one path against a reference, shapes, options. See test_mixers for tests of all mixers."""

from __future__ import annotations

from math import inf

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Grid, Paths, ScanOrder
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.scans import bsm, csm, raster

SMALL = {"d_state": 5, "head_dim": 4, "d_conv": 3}


def trained(mixer: Mamba2Mixer) -> Mamba2Mixer:
    """The mixer with every parameter perturbed, so that paths differ."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return mixer


def one_path(mixer: Mamba2Mixer, x: Tensor, path: Tensor, k: int) -> Tensor:
    """Reference for path k: gather, conv, recurrence, gather back, gated norm; before the merge."""
    inner, heads, size = mixer.inner, mixer.heads, mixer.d_state * mixer.num_groups
    z, xBC, dt = (x @ mixer.in_proj.weight.T).split([inner, inner + 2 * size, heads], -1)
    xBC, dt = xBC[:, path], dt[:, path]
    channels = inner + 2 * size
    weight, bias = (
        mixer.conv1d.weight[k * channels : (k + 1) * channels],
        mixer.conv1d.bias[k * channels : (k + 1) * channels],
    )
    xBC = F.silu(
        F.conv1d(F.pad(xBC.transpose(1, 2), [weight.shape[-1] - 1, 0]), weight, bias, groups=channels)
    ).transpose(1, 2)
    u, B, C = xBC.split([inner, size, size], -1)
    own = slice(k * heads, (k + 1) * heads)
    dt = F.softplus(dt + mixer.dt_bias[own]).clamp(*mixer.dt_limit)
    A, D = -mixer.A_log[own].exp(), mixer.D[own]
    u = u.unflatten(-1, (heads, -1))
    per_head = heads // mixer.num_groups
    B, C = (t.unflatten(-1, (mixer.num_groups, -1)).repeat_interleave(per_head, 2) for t in (B, C))
    h = torch.zeros(len(x), heads, mixer.head_dim, mixer.d_state, dtype=x.dtype)
    y = torch.empty_like(u)
    for t in range(x.shape[1]):
        h = h * (dt[:, t] * A).exp()[..., None, None] + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        y[:, t] = (h * C[:, t, :, None]).sum(-1) + D[:, None] * u[:, t]
    back = torch.empty_like(y)
    back[:, path] = y
    gated = (back.flatten(2) * F.silu(z)).unflatten(-1, (mixer.norm.groups, -1))
    return (gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + 1e-5)).flatten(2) * mixer.norm.weight


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("order", "groups", "merge"), [(raster, 2, "mean"), (bsm, 1, "mean"), (csm, 2, "mean"), (bsm, 1, "sum")]
)
def test_paths_equal_the_reference(order: ScanOrder, groups: int, merge: str, own: bool) -> None:
    paths = order(Grid(1, 2, 3))
    parameters = "own" if own else "shared"
    options = {"num_groups": groups, "merge": merge, "path_parameters": parameters, **SMALL}
    mixer, x = trained(Mamba2Mixer(8, len(paths), **options)), torch.randn(2, 6, 8)
    each = torch.stack([one_path(mixer, x, path, k if own else 0) for k, path in enumerate(paths)])
    merged = each.mean(0) if merge == "mean" else each.sum(0)
    torch.testing.assert_close(mixer(x, Paths.of(paths)), merged @ mixer.out_proj.weight.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("norm_groups", [2, 4, 16])
def test_each_norm_group_is_normalized_separately(norm_groups: int, num_groups: int) -> None:
    check_option(Mamba2Mixer(8, num_groups=num_groups, norm_groups=1, **SMALL), norm_groups=norm_groups)


def test_norm_groups_default_to_num_groups() -> None:
    assert [Mamba2Mixer(8, num_groups=groups, **SMALL).norm.groups for groups in (1, 2, 4)] == [1, 2, 4]


@pytest.mark.parametrize("limit", [(0.0, 0.02), (0.3, inf), (0.04, 0.06)])
def test_step_sizes_stay_within_their_limits(limit: tuple[float, float]) -> None:
    check_option(Mamba2Mixer(8, **SMALL), dt_limit=limit)


@torch.no_grad()
def check_option(without: Mamba2Mixer, **option: object) -> None:
    """Forward, prefill and steps equal the reference, and differ from a mixer `without` the option."""
    mixer, x = trained(Mamba2Mixer(8, num_groups=without.num_groups, **SMALL, **option)), torch.randn(2, 9, 8)
    expected = one_path(mixer, x, torch.arange(9), 0) @ mixer.out_proj.weight.T
    prefilled, stepped = mixer.new_state(2), mixer.new_state(2)
    steps = torch.stack([mixer.step(x[:, t], stepped) for t in range(9)], 1)
    for y in (mixer(x), mixer.prefill(x, torch.tensor([9, 9]), prefilled), steps):
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    without.load_state_dict(mixer.state_dict())
    assert (without(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("parameters", "count"), [("own", 3), ("shared", 1)])
def test_shapes(parameters: str, count: int) -> None:
    mixer = Mamba2Mixer(8, 3, num_groups=2, norm_groups=2, path_parameters=parameters, **SMALL)
    heads, channels = 4, 16 + 2 * 2 * 5
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "in_proj.weight": (16 + channels + heads, 8),
        "conv1d.weight": (count * channels, 1, 3),
        "conv1d.bias": (count * channels,),
        "dt_bias": (count * heads,),
        "A_log": (count * heads,),
        "D": (count * heads,),
        "norm.weight": (16,),
        "out_proj.weight": (8, 16),
    }
    state = Mamba2Mixer(8, num_groups=2, **SMALL).new_state(7)
    assert (state.conv.shape, state.ssm.shape) == ((7, 2, channels), (7, heads, 4, 5))


def test_paths_start_as_copies_of_the_first() -> None:
    mixer = Mamba2Mixer(8, 3, **SMALL)
    for parameter in (mixer.A_log, mixer.D, mixer.dt_bias):
        first, *others = parameter.chunk(3)
        assert all(torch.equal(first, other) for other in others)


def test_step_sizes_start_between_a_thousandth_and_a_tenth() -> None:
    dt = F.softplus(Mamba2Mixer(512, **SMALL).dt_bias)
    assert 0.00099 < dt.min() < 0.003
    assert 0.03 < dt.max() < 0.1001


def test_step_sizes_and_decay_rates_start_in_the_given_ranges() -> None:
    mixer = Mamba2Mixer(512, **SMALL, dt_init=(0.2, 0.8), A_init=(0.5, 2.0))
    for values, lowest, highest in ((F.softplus(mixer.dt_bias), 0.2, 0.8), (mixer.A_log.exp(), 0.5, 2.0)):
        assert lowest * 0.999 < values.min() < lowest * 1.3
        assert highest / 1.3 < values.max() < highest * 1.001


@pytest.mark.parametrize("name", ["dt_init", "A_init"])
@pytest.mark.parametrize("range_", [(0.0, 1.0), (2.0, 1.0), (1.0, float("inf")), (-1.0, 1.0), (float("nan"), 1.0)])
def test_an_invalid_range_is_rejected(name: str, range_: tuple[float, float]) -> None:
    with pytest.raises(ShapeError, match=rf"^{name} must be \(lowest, highest\) with 0 < lowest <= highest, received"):
        Mamba2Mixer(8, **SMALL, **{name: range_})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, r"head_dim 5 must divide expand \* width = 2 \* 8 = 16"),
        ({"num_groups": 3}, "num_groups 3 must divide the number of heads, 16 / 4 = 4"),
        ({"norm_groups": 3}, "norm_groups 3 must divide the inner width 16"),
    ],
)
def test_the_message_names_the_number_that_does_not_divide(options: dict[str, int], message: str) -> None:
    with pytest.raises(ShapeError, match=f"^{message}$"):
        Mamba2Mixer(8, **{**SMALL, **options})
