from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmvl.errors import ShapeError
from ssmvl.ops.ssd import ssd, ssd_step


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, one position after another, in fp64."""
    x, dt, A, B, C, D, h = (t.double() for t in (x, dt, A, B, C, D, state))
    repeat = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + torch.einsum("bh,bhp,bhs->bhps", dt[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("bhps,bhs->bhp", h, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(ys, 1) if ys else x, h


def inputs(
    rows: int, length: int, heads: int, groups: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> dict[str, Tensor]:
    width, size = 3, 5
    return {
        "x": torch.randn(rows, length, heads, width, dtype=dtype),
        "dt": torch.rand(rows, length, heads, dtype=dtype) * scale,
        "A": -torch.rand(heads, dtype=dtype) - 0.1,
        "B": torch.randn(rows, length, groups, size, dtype=dtype),
        "C": torch.randn(rows, length, groups, size, dtype=dtype),
        "D": torch.randn(heads, dtype=dtype),
        "state": torch.randn(rows, heads, width, size, dtype=dtype),
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 40), st.sampled_from([(2, 1), (4, 2), (3, 3)]), st.integers(1, 50), st.booleans()
)
def test_chunked_equals_recurrence(rows: int, length: int, heads: tuple[int, int], chunk: int, fast: bool) -> None:
    values = inputs(rows, length, *heads, scale=18.0 if fast else 0.5)
    y, state = ssd(**values, chunk=chunk)
    expected, last = recurrence(**values)
    assert relative(y, expected) < 1e-4
    assert relative(state, last) < 1e-4


def test_gradients_in_fp64() -> None:
    values = inputs(2, 7, 4, 2, torch.float64)
    names = list(values)
    for tensor in values.values():
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: ssd(**dict(zip(names, t, strict=True)), chunk=3), tuple(values.values()))


def test_gradients_with_segments_in_fp64() -> None:
    values = {k: v.requires_grad_() for k, v in inputs(1, 7, 2, 1, torch.float64).items() if k != "state"}
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2]], dtype=torch.int32)
    names = list(values)

    def run(*tensors: Tensor) -> Tensor:
        return ssd(**dict(zip(names, tensors, strict=True)), segments=segments, chunk=3)[0]

    assert torch.autograd.gradcheck(run, tuple(values.values()))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 20))
def test_segments_equal_samples_apart(lengths: list[int], chunk: int) -> None:
    values = inputs(1, sum(lengths), 4, 2)
    del values["state"]
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()
    packed, _ = ssd(**values, segments=segments, chunk=chunk)
    start = 0
    for length in lengths:
        apart, _ = ssd(**{k: v[:, start : start + length] if v.ndim > 2 else v for k, v in values.items()})
        torch.testing.assert_close(packed[:, start : start + length], apart, atol=1e-5, rtol=1e-4)
        start += length


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(1, 30))
def test_rows_of_any_length_equal_the_row_alone(lengths: list[int], chunk: int) -> None:
    values = inputs(len(lengths), 20, 2, 1)
    y, state = ssd(**values, lengths=torch.tensor(lengths), chunk=chunk)
    for row, length in enumerate(lengths):
        one = {k: v[row : row + 1] if v.ndim > 1 else v for k, v in values.items()}
        cut = {k: v[:, :length] if v.ndim > 2 and k != "state" else v for k, v in one.items()}
        expected, last = ssd(**cut)
        torch.testing.assert_close(y[row : row + 1, :length], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state[row : row + 1], last, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cut", range(21))
def test_splitting_equals_one_call(cut: int) -> None:
    values = inputs(2, 20, 2, 1)
    y, state = ssd(**values, chunk=8)
    halves = []
    carried = values["state"]
    for part in (slice(0, cut), slice(cut, 20)):
        sliced = {k: v[:, part] if v.ndim > 2 else v for k, v in values.items() if k != "state"}
        half, carried = ssd(**sliced, state=carried, chunk=8)
        halves.append(half)
    torch.testing.assert_close(torch.cat(halves, 1), y, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(carried, state, atol=1e-5, rtol=1e-4)


def test_steps_equal_chunked() -> None:
    values = inputs(2, 9, 4, 2)
    y, last = ssd(**values)
    state = values["state"].clone()
    pointer = state.data_ptr()
    for t in range(9):
        one = ssd_step(
            *(values[k][:, t] for k in ("x", "dt")), values["A"], *(values[k][:, t] for k in "BC"), values["D"], state
        )
        torch.testing.assert_close(one, y[:, t], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-4)
    assert state.data_ptr() == pointer


def test_very_long_decay_stays_finite_forward_and_backward() -> None:
    values = {k: v.requires_grad_() for k, v in inputs(1, 130, 2, 1, scale=1e4).items()}
    y, state = ssd(**values)
    (y.sum() + state.sum()).backward()
    assert y.isfinite().all()
    assert all(v.grad.isfinite().all() for v in values.values())


def test_autocast_leaves_the_state_in_fp32() -> None:
    values = inputs(1, 70, 2, 1)
    expected, last = ssd(**values)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = ssd(**values)
    assert state.dtype == torch.float32
    assert torch.equal(y, expected)
    assert torch.equal(state, last)


def test_groups_that_do_not_divide_heads_are_refused() -> None:
    values = inputs(1, 4, 3, 2) | {"state": None}
    with pytest.raises(ShapeError, match="3 heads cannot share 2 groups"):
        ssd(**values)


def test_state_and_segments_exclude_each_other() -> None:
    with pytest.raises(ShapeError, match="exclude"):
        ssd(**inputs(1, 4, 2, 1), segments=torch.zeros(1, 4, dtype=torch.int32))
