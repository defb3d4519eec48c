from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ssmvl.ops.causal_conv import causal_conv, causal_conv_step


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, window: Tensor | None = None) -> Tensor:
    before = x.new_zeros(len(x), weight.shape[1] - 1, x.shape[2]) if window is None else window
    padded = torch.cat([before, x], 1).transpose(1, 2)
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=x.shape[2])).transpose(1, 2)


def tensors(rows: int, length: int, taps: int, channels: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random input, weight, bias and window."""
    shapes = (rows, length, channels), (channels, taps), (channels,), (rows, taps - 1, channels)
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(("rows", "length"), [*((2, n) for n in (1, 2, 3, 4, 9)), (1, 300), (1, 700), (20, 45)])
@pytest.mark.parametrize("taps", [1, 2, 3, 4])
def test_equals_torch_forward_and_backward(  # a tile has 256 positions of one row, or 16 of twenty
    taps: int, length: int, rows: int
) -> None:
    x, weight, bias, window = (t.requires_grad_() for t in tensors(rows, length, taps, dtype=torch.float64))
    for arguments in ((x, weight), (x, weight, bias), (x, weight, bias, window)):
        ours = causal_conv(*arguments[:3], window=arguments[3] if len(arguments) > 3 else None)[0]
        theirs = by_torch(*arguments)
        torch.testing.assert_close(ours, theirs)
        weights = torch.randn_like(theirs)
        grads, expected = (torch.autograd.grad((y * weights).sum(), arguments) for y in (ours, theirs))
        torch.testing.assert_close(grads, expected)


def test_fp32_equals_fp64() -> None:
    inputs = tensors(2, 300, 4)
    y, _ = causal_conv(*inputs[:3], window=inputs[3])
    torch.testing.assert_close(y.double(), by_torch(*(t.double() for t in inputs)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "length", "taps"), [(1, 2, 4), (2, 7, 4), (2, 5, 1), (16, 22, 3)])
def test_gradcheck(rows: int, length: int, taps: int) -> None:
    x, weight, bias, window = (t.requires_grad_() for t in tensors(rows, length, taps, 2, torch.float64))
    segments = (torch.arange(length) * 3 // length).expand(rows, -1)

    def carried(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv(x, weight, bias, window=window)

    def short(x: Tensor, weight: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv(x, weight, window=window, lengths=torch.arange(rows) % (length + 1))

    fast = rows * length > 20
    assert torch.autograd.gradcheck(carried, (x, weight, bias, window), fast_mode=fast)
    assert torch.autograd.gradcheck(short, (x, weight, window), fast_mode=fast)
    assert torch.autograd.gradcheck(
        lambda a, b, c: causal_conv(a, b, c, segments=segments)[0], (x, weight, bias), fast_mode=fast
    )


def test_inputs_and_gradients_of_any_layout() -> None:
    projected = torch.randn(2, 30, 11, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64).t().requires_grad_()
    bias = torch.randn(10, dtype=torch.float64)[::2].requires_grad_()
    window = torch.randn(2, 5, 3, dtype=torch.float64).transpose(1, 2).requires_grad_()
    grads = []
    for y in (
        causal_conv(projected[..., 3:8], weight, bias, window=window)[0],
        by_torch(projected[..., 3:8], weight, bias, window),
    ):
        loss = y.sum() + y.transpose(1, 2).contiguous().pow(2).sum() + y[:, ::3].expand(3, *y[:, ::3].shape).sum()
        grads.append(torch.autograd.grad(loss, (projected, weight, bias, window)))
    torch.testing.assert_close(*grads)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(1, 4))
def test_splitting_equals_one_call(cut: int, taps: int) -> None:
    x, weight, bias, before = tensors(2, 9, taps)
    y, window = causal_conv(x, weight, bias, window=before)
    first, carried = causal_conv(x[:, :cut], weight, bias, window=before)
    second, carried = causal_conv(x[:, cut:], weight, bias, window=carried)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    assert torch.equal(carried, window)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), st.integers(1, 4), st.booleans())
def test_rows_of_any_length_equal_the_row_alone(lengths: list[int], taps: int, from_zeros: bool) -> None:
    x, weight, bias, before = tensors(len(lengths), 8, taps)
    y, window = causal_conv(x, weight, bias, window=None if from_zeros else before, lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        expected, alone = causal_conv(x[one, :length], weight, bias, window=None if from_zeros else before[one])
        torch.testing.assert_close(y[one, :length], expected)
        assert torch.equal(window[one], alone)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 4))
def test_a_packed_row_equals_separate_samples(samples: list[int], taps: int, padding: int) -> None:
    x, weight, bias, _ = tensors(1, sum(samples) + padding, taps, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    marks = torch.repeat_interleave(torch.tensor([*range(len(samples)), -1]), torch.tensor([*samples, padding]))
    y = causal_conv(*leaves, segments=marks[None].int())[0][:, : sum(samples)]
    separate = torch.cat([causal_conv(part, weight, bias)[0] for part in x[:, : sum(samples)].split(samples, 1)], 1)
    torch.testing.assert_close(y, separate)
    weights = torch.randn_like(y)
    grads, expected = (torch.autograd.grad((out * weights).sum(), leaves) for out in (y, separate))
    torch.testing.assert_close(grads, expected)


def test_segments_that_meet_at_a_tile_boundary() -> None:
    x, weight, bias, _ = tensors(1, 600, 4)
    samples = [1, 2, 256, 1, 255, 2, 83]
    marks = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(samples))[None]
    y, _ = causal_conv(x, weight, bias, segments=marks)
    torch.testing.assert_close(y, torch.cat([by_torch(part, weight, bias) for part in x.split(samples, 1)], 1))


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_steps_equal_the_sequence(taps: int) -> None:
    x, weight, bias, window = tensors(2, 6, taps)
    y, last = causal_conv(x, weight, bias, window=window)
    pointer = window.data_ptr()
    steps = [causal_conv_step(x[:, t], weight, bias, window) for t in range(6)]
    torch.testing.assert_close(torch.stack(steps, 1), y)
    assert torch.equal(window, last)
    assert window.data_ptr() == pointer


@pytest.mark.parametrize("taps", [1, 4])
def test_an_empty_sequence_leaves_the_window_unchanged(taps: int) -> None:
    x, weight, bias, window = tensors(2, 0, taps)
    y, after = causal_conv(x, weight, bias, window=window)
    assert y.shape == x.shape
    assert torch.equal(after, window)
    assert torch.equal(causal_conv(x, weight, bias)[1], torch.zeros_like(window))


@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes(autocast: bool) -> None:
    x, weight, bias, window = tensors(2, 30, 4)
    expected = causal_conv(x, weight, bias, window=window)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(causal_conv(x, weight, bias, window=window)[0], expected)
        y, after = causal_conv(x.bfloat16(), weight, bias, window=window)
        exact, _ = causal_conv(x.double(), weight, bias, window=window)
    assert (y.dtype, after.dtype, exact.dtype) == (torch.bfloat16, torch.bfloat16, torch.float64)
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.05)
    torch.testing.assert_close(exact.float(), expected)


def test_gradients_under_autocast_equal_those_without() -> None:
    inputs = [t.requires_grad_() for t in tensors(2, 30, 4)]
    grads = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, _ = causal_conv(*inputs[:3], window=inputs[3])
            grads.append(torch.autograd.grad(y.square().sum(), inputs))
    assert all(map(torch.equal, *grads))
