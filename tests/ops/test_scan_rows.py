"""Steps, splits, lengths, segments and dtypes of both state-space ops."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import SEQUENCES, Values, inputs, positions, recurrence, relative, row
from torch import Tensor

from ssmvl.errors import ShapeError
from ssmvl.ops.selective_scan import selective_scan, selective_scan_step
from ssmvl.ops.ssd import ssd, ssd_step

OPS = {"ssd": (ssd, ssd_step), "selective_scan": (selective_scan, selective_scan_step)}
both = pytest.mark.parametrize("op", OPS)
assert_close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-4)
OPTIONS: dict[str, Values] = {
    "D": {},
    "no D": {"D": None},
    "all": {"dt_bias": torch.linspace(-1, 1, 4), "dt_softplus": True, "dt_limit": (0.3, 2.0)},
}
options = pytest.mark.parametrize("options", OPTIONS)


@both
@options
def test_steps_equal_the_sequence(op: str, options: str) -> None:
    run, step = OPS[op]
    values = inputs(op, 2, 9) | OPTIONS[options]
    y, last = run(**values, chunk=4)
    state = values["state"].clone()
    pointer = state.data_ptr()
    ys = []
    for t in range(9):
        now = {name: value[:, t] if name in SEQUENCES else value for name, value in values.items()}
        ys.append(step(**now | {"state": state}))
    assert_close(torch.stack(ys, 1), y)
    assert_close(state, last)
    assert state.data_ptr() == pointer


@both
def test_a_step_accepts_inputs_of_any_layout_and_dtype(op: str) -> None:
    step = OPS[op][1]
    now = {name: value[:, 0] if name in SEQUENCES else value for name, value in inputs(op, 2, 1).items()}
    contiguous = now | {"state": now["state"].clone()}
    expected = step(**contiguous)
    strided = {name: value.mT.contiguous().mT if value.ndim > 1 else value for name, value in now.items()}
    strided |= {"state": now["state"].clone()}
    assert_close(step(**strided), expected)
    assert_close(strided["state"], contiguous["state"])
    halved = {name: value.bfloat16() for name, value in now.items()} | {"state": now["state"].clone()}
    y = step(**halved)
    assert y.dtype == torch.bfloat16
    assert halved["state"].dtype == torch.float32
    assert relative(y, expected.double()) < 0.05


@both
def test_a_step_rejects_a_state_that_is_not_contiguous(op: str) -> None:
    now = {name: value[:, 0] if name in SEQUENCES else value for name, value in inputs(op, 2, 1).items()}
    strided = now["state"].mT.contiguous().mT
    before = strided.clone()
    with pytest.raises(ShapeError, match="not contiguous"):
        OPS[op][1](**now | {"state": strided})
    assert torch.equal(strided, before)


@both
def test_a_step_builds_no_graph(op: str) -> None:
    now = {name: value[:, 0] if name in SEQUENCES else value for name, value in inputs(op, 2, 1).items()}
    now = {name: value.requires_grad_(name != "state") for name, value in now.items()}
    assert not OPS[op][1](**now).requires_grad
    assert not now["state"].requires_grad


@both
@pytest.mark.parametrize("cut", range(21))
def test_splitting_equals_one_call(op: str, cut: int) -> None:
    run = OPS[op][0]
    values = inputs(op, 2, 20) | {"chunk": 8}
    y, state = run(**values)
    first, carried = run(**positions(values, slice(0, cut)))
    second, carried = run(**positions(values, slice(cut, 20)) | {"state": carried})
    assert_close(torch.cat([first, second], 1), y)
    assert_close(carried, state)


@both
@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4), chunk=st.integers(1, 30), from_zeros=st.booleans())
def test_rows_of_any_length_equal_the_row_alone(op: str, lengths: list[int], chunk: int, from_zeros: bool) -> None:
    run = OPS[op][0]
    values = inputs(op, len(lengths), 20) | {"chunk": chunk}
    if from_zeros:
        del values["state"]
    y, state = run(**values, lengths=torch.tensor(lengths))
    for index, length in enumerate(lengths):
        expected, last = run(**positions(row(values, index), slice(0, length)))
        assert_close(y[index : index + 1, :length], expected)
        assert_close(state[index : index + 1], last)


def packed(op: str, samples: list[int], dtype: torch.dtype = torch.float32, padding: int = 0) -> tuple[Values, Tensor]:
    values = inputs(op, 1, sum(samples) + padding, dtype=dtype)
    del values["state"]
    counts = torch.tensor([*samples, padding])
    names = torch.tensor([*range(len(samples)), -1])
    return values, torch.repeat_interleave(names, counts)[None].int()


def slices(samples: list[int]) -> list[slice]:
    ends = torch.tensor(samples).cumsum(0).tolist()
    return [slice(end - length, end) for length, end in zip(samples, ends, strict=True)]


@both
@settings(deadline=None, max_examples=25)
@given(
    samples=st.lists(st.integers(1, 12), min_size=1, max_size=5), chunk=st.integers(1, 20), padding=st.integers(0, 9)
)
def test_a_packed_row_equals_separate_samples(op: str, samples: list[int], chunk: int, padding: int) -> None:
    run = OPS[op][0]
    values, segments = packed(op, samples, padding=padding)
    y, state = run(**values, segments=segments, chunk=chunk)
    for part in slices(samples):
        expected, last = run(**positions(values, part))
        assert_close(y[:, part], expected)
    if not padding:
        assert_close(state, last)


@both
@settings(deadline=None, max_examples=15)
@given(samples=st.lists(st.integers(1, 8), min_size=1, max_size=4), chunk=st.integers(1, 12), padding=st.integers(0, 5))
def test_gradients_of_a_packed_row_are_those_of_its_samples(
    op: str, samples: list[int], chunk: int, padding: int
) -> None:
    run = OPS[op][0]
    values, segments = packed(op, samples, torch.float64, padding)
    values["dt_bias"] = torch.rand(4, dtype=torch.float64)
    weights = torch.randn_like(values["x"])
    weights[:, sum(samples) :] = 0
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    y, _ = run(**leaves, segments=segments, chunk=chunk, dt_softplus=True)
    grads = torch.autograd.grad((y * weights).sum(), tuple(leaves.values()))
    total = sum(
        (run(**positions(leaves, part), dt_softplus=True)[0] * weights[:, part]).sum() for part in slices(samples)
    )
    expected = torch.autograd.grad(total, tuple(leaves.values()))
    for name, ours, theirs in zip(leaves, grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


@both
@pytest.mark.parametrize(
    "marks", [{"segments": torch.tensor([[0] * 3 + [1] * 4 + [-1] * 5])}, {"lengths": torch.tensor([7])}]
)
def test_values_in_the_padding_reach_no_real_position(op: str, marks: Values) -> None:
    values = inputs(op, 1, 12) | {"state": None, "chunk": 5}
    other = values | {name: values[name].clone() for name in SEQUENCES}
    for name in SEQUENCES:
        other[name][:, 7:] = 50
    (y, state), (same, after) = (OPS[op][0](**call, **marks) for call in (values, other))
    assert_close(y[:, :7], same[:, :7])
    if "lengths" in marks:
        assert_close(state, after)


@both
def test_a_row_with_only_padding_is_accepted(op: str) -> None:
    values = inputs(op, 2, 4) | {"state": None}
    y, _ = OPS[op][0](**values, segments=torch.tensor([[0, 0, 1, -1], [-1, -1, -1, -1]]))
    assert y.isfinite().all()


@both
@pytest.mark.parametrize("rows", [1, 3])
def test_an_empty_sequence_leaves_the_state_unchanged(op: str, rows: int) -> None:
    run = OPS[op][0]
    values = inputs(op, rows, 0)
    y, state = run(**values)
    assert y.shape == values["x"].shape
    assert torch.equal(state, values["state"])
    assert torch.equal(run(**values | {"state": None})[1], torch.zeros_like(state))
    assert torch.equal(run(**values, lengths=torch.zeros(rows, dtype=torch.long))[1], state)
    y, state = run(**{name: value.bfloat16() for name, value in values.items()})
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@both
def test_the_initial_state_is_not_modified(op: str) -> None:
    values = inputs(op, 2, 9)
    before = {name: value.clone() for name, value in values.items()}
    with torch.no_grad():
        OPS[op][0](**values, chunk=4, lengths=torch.tensor([9, 0]))
    assert all(torch.equal(value, before[name]) for name, value in values.items())


@both
@pytest.mark.parametrize("dt", [1e-10, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("length", [1, 2, 70])
def test_a_length_of_1_and_extreme_step_sizes(op: str, length: int, dt: float) -> None:
    values = inputs(op, 2, length)
    values["dt"] = torch.full_like(values["dt"], dt)
    for call in (values, values | {"D": None, "state": None}):
        for ours, theirs in zip(OPS[op][0](**call), recurrence(**call), strict=True):
            assert relative(ours, theirs) <= 1e-4


@both
def test_autocast_changes_no_bit(op: str) -> None:
    run, step = OPS[op]
    values = inputs(op, 2, 70) | OPTIONS["all"]
    expected, last = run(**values)
    now = {name: value[:, 0] if name in SEQUENCES else value for name, value in values.items()}
    states = [values["state"].clone() for _ in range(2)]
    expected_step = step(**now | {"state": states[0]})
    with torch.autocast("cpu", torch.bfloat16):
        y, state = run(**values)
        y_step = step(**now | {"state": states[1]})
    assert (y.dtype, state.dtype, y_step.dtype) == (torch.float32,) * 3
    assert all(map(torch.equal, (y, state, y_step, states[1]), (expected, last, expected_step, states[0])))


@both
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_of_the_results(op: str, autocast: bool) -> None:
    run = OPS[op][0]
    values = inputs(op, 2, 70)
    expected, last = recurrence(**values)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = run(**values | {name: values[name].bfloat16() for name in SEQUENCES})
        exact, exact_state = run(**{name: value.double() for name, value in values.items()})
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (exact.dtype, exact_state.dtype) == (torch.float64, torch.float64)
    assert max(relative(y, expected), relative(state, last)) < 0.02
    assert max(relative(exact, expected), relative(exact_state, last)) < 1e-12


@both
@pytest.mark.parametrize("backward_too", [False, True])
def test_gradients_under_autocast_equal_those_without(op: str, backward_too: bool) -> None:
    values = inputs(op, 2, 70)
    grads = []
    for enabled in (True, False):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, state = OPS[op][0](**leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and backward_too):
            grads.append(torch.autograd.grad(y.sum() + state.sum(), tuple(leaves.values())))
    assert all(map(torch.equal, *grads))
