from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Grid
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.scans import bsm, csm

SMALL = {"d_state": 5, "head_dim": 4, "d_conv": 3}


def trained(mixer: Mamba2Mixer) -> Mamba2Mixer:
    """The mixer with every parameter moved, so that paths differ."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return mixer


def one_path(mixer: Mamba2Mixer, x: Tensor, path: Tensor, k: int) -> Tensor:
    """Path k written out straight: gather, conv, recurrence, gather back, gated norm; before the merge."""
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
    dt = F.softplus(dt + mixer.dt_bias[own])
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
    gated = back.flatten(2) * F.silu(z)
    return gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight


@pytest.mark.parametrize(("order", "groups", "merge"), [(bsm, 1, "mean"), (csm, 2, "mean"), (bsm, 1, "sum")])
def test_paths_equal_each_written_out_straight(order: object, groups: int, merge: str) -> None:
    paths = order(Grid(1, 2, 3))
    mixer = trained(Mamba2Mixer(8, len(paths), num_groups=groups, merge=merge, **SMALL))
    x = torch.randn(2, 6, 8)
    each = torch.stack([one_path(mixer, x, path, k) for k, path in enumerate(paths)])
    merged = each.mean(0) if merge == "mean" else each.sum(0)
    torch.testing.assert_close(mixer(x, paths), merged @ mixer.out_proj.weight.T, atol=1e-5, rtol=1e-4)


def test_paths_start_as_copies_of_the_first() -> None:
    mixer = Mamba2Mixer(8, 3, **SMALL)
    for parameter in (mixer.A_log, mixer.D, mixer.dt_bias):
        first, *others = parameter.chunk(3)
        assert all(torch.equal(first, other) for other in others)


def test_causal() -> None:
    mixer, x = Mamba2Mixer(8, **SMALL), torch.randn(1, 9, 8)
    y = mixer(x)
    x[:, 5] += 1
    changed = (mixer(x) - y).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False] * 5 + [True] * 4


@pytest.mark.parametrize("cut", range(13))
def test_prefill_in_two_parts_and_steps_equal_forward(cut: int) -> None:
    mixer, x = trained(Mamba2Mixer(8, num_groups=2, **SMALL)), torch.randn(2, 12, 8)
    with torch.no_grad():
        y = mixer(x)
        state = mixer.new_state(2)
        first = mixer.prefill(x[:, :cut], torch.full((2,), cut), state)
        after = [t.clone() for t in state]
        second = mixer.prefill(x[:, cut:], torch.full((2,), 12 - cut), state)
        torch.testing.assert_close(torch.cat([first, second], 1), y, atol=1e-5, rtol=1e-4)
        stepped = type(state)(*after)
        for t in range(cut, 12):
            torch.testing.assert_close(mixer.step(x[:, t], stepped), y[:, t], atol=1e-5, rtol=1e-4)
        for a, b in zip(stepped, state, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_rows_of_mixed_lengths_equal_the_row_alone() -> None:
    mixer, x, lengths = trained(Mamba2Mixer(8, **SMALL)), torch.randn(3, 9, 8), [9, 2, 5]
    with torch.no_grad():
        state = mixer.new_state(3)
        y = mixer.prefill(x, torch.tensor(lengths), state)
        for row, length in enumerate(lengths):
            alone = mixer.new_state(1)
            expected = mixer.prefill(x[row : row + 1, :length], torch.tensor([length]), alone)
            torch.testing.assert_close(y[row : row + 1, :length], expected, atol=1e-5, rtol=1e-4)
            for mixed, single in zip(state, alone, strict=True):
                torch.testing.assert_close(mixed[row : row + 1], single, atol=1e-5, rtol=1e-4)


def test_packed_row_equals_samples_apart_forward_and_backward() -> None:
    mixer = trained(Mamba2Mixer(8, **SMALL))
    x = torch.randn(1, 10, 8, requires_grad=True)
    segments = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 2]], dtype=torch.int32)
    packed = mixer(x, None, segments)
    apart = torch.cat([mixer(part) for part in x.split([3, 1, 6], dim=1)], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-4)
    (one,), (other,) = torch.autograd.grad(packed.sum(), x), torch.autograd.grad(apart.sum(), x)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_state_stays_fp32_in_bf16() -> None:
    state = Mamba2Mixer(8, **SMALL).bfloat16().new_state(1)
    assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)


def test_gradients_in_fp64() -> None:
    mixer = trained(Mamba2Mixer(4, 2, d_state=2, head_dim=4, d_conv=2).double())
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    paths = bsm(Grid(1, 2, 2))
    assert torch.autograd.gradcheck(lambda x: mixer(x, paths), (x,))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"head_dim": 5}, "head_dim 5 must divide expand .* 2 . 8 = 16"), ({"num_groups": 3}, "num_groups 3 must divide")],
)
def test_shapes_that_do_not_divide_say_which_number_to_change(options: dict[str, int], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Mamba2Mixer(8, **{**SMALL, **options})


def test_another_number_of_paths_is_refused() -> None:
    with pytest.raises(ShapeError, match="num_paths=4 received 2 paths"):
        Mamba2Mixer(8, 4, **SMALL)(torch.randn(1, 6, 8), bsm(Grid(1, 2, 3)))
    with pytest.raises(ShapeError, match="num_paths=4 received none paths"):
        Mamba2Mixer(8, 4, **SMALL)(torch.randn(1, 6, 8))
