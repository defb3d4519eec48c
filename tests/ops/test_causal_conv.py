from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ssmvl.ops.causal_conv import causal_conv, causal_conv_step


def test_equals_torch_conv1d() -> None:
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(5)
    expected = F.conv1d(F.pad(x.transpose(1, 2), [3, 0]), weight[:, None], bias, groups=5).transpose(1, 2)
    torch.testing.assert_close(causal_conv(x, weight, bias)[0], expected)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 4))
def test_splitting_equals_one_call(cut: int, taps: int) -> None:
    x, weight = torch.randn(2, 9, 3), torch.randn(3, taps)
    y, window = causal_conv(x, weight)
    first, carried = causal_conv(x[:, :cut], weight)
    second, carried = causal_conv(x[:, cut:], weight, window=carried)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(carried, window)


@settings(deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=4))
def test_window_ends_at_each_rows_length(lengths: list[int]) -> None:
    x, weight, before = torch.randn(len(lengths), 8, 3), torch.randn(3, 4), torch.randn(len(lengths), 3, 3)
    _, window = causal_conv(x, weight, window=before, lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        _, alone = causal_conv(x[row : row + 1, :length], weight, window=before[row : row + 1])
        torch.testing.assert_close(window[row : row + 1], alone)


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_segments_never_see_each_other(lengths: list[int]) -> None:
    x, weight, bias = torch.randn(1, sum(lengths), 3), torch.randn(3, 4), torch.randn(3)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()
    y, _ = causal_conv(x, weight, bias, segments=segments)
    apart = [causal_conv(part, weight, bias)[0] for part in x.split(lengths, dim=1)]
    torch.testing.assert_close(y, torch.cat(apart, 1))


def test_steps_equal_the_sequence() -> None:
    x, weight, bias, window = torch.randn(2, 6, 3), torch.randn(3, 4), torch.randn(3), torch.zeros(2, 3, 3)
    y, last = causal_conv(x, weight, bias)
    steps = [causal_conv_step(x[:, t], weight, bias, window) for t in range(6)]
    torch.testing.assert_close(torch.stack(steps, 1), y)
    torch.testing.assert_close(window, last)


def test_gradients_in_fp64() -> None:
    x, weight, bias, window = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 3), (3, 4), (3,), (2, 3, 3))
    )
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])
    assert torch.autograd.gradcheck(lambda a, b, c, d: causal_conv(a, b, c, window=d), (x, weight, bias, window))
    assert torch.autograd.gradcheck(lambda a, b: causal_conv(a, b, segments=segments)[0], (x, weight))
