from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Values, calls, inputs, recurrence, relative

from ssmvl.ops.selective_scan import selective_scan


def errors(values: Values) -> tuple[float, float]:
    """Relative errors of y and of the state."""
    y, state = selective_scan(**values)
    expected, last = recurrence(**values)
    assert y.isfinite().all()
    assert state.isfinite().all()
    return relative(y, expected), relative(state, last)


@settings(deadline=None, max_examples=60)
@given(calls("selective_scan"))
def test_tiled_equals_recurrence(values: Values) -> None:
    assert max(errors(values)) <= 1e-4


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 50), st.floats(20, 1e6), st.booleans())
def test_faster_decays_are_accurate_to_a_thousandth(
    seed: int, length: int, chunk: int, largest: float, all_largest: bool
) -> None:
    torch.manual_seed(seed)
    values = inputs("selective_scan", 2, length)
    values["A"] = torch.tensor([-1.0, -0.5, -1e-6, -1.0])[:, None] * torch.tensor([1.0, 1e-6, 1.0, 0.1, 1e-3])
    values["dt"] = values["dt"] * largest if not all_largest else torch.full_like(values["dt"], largest)
    assert max(errors(values | {"chunk": chunk})) <= 1e-3


@pytest.mark.parametrize("chunk", [16, None])
@pytest.mark.parametrize("slow", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("fast_first", [True, False])
def test_steps_of_20_next_to_steps_near_0(fast_first: bool, slow: float, chunk: int | None) -> None:
    values = inputs("selective_scan", 1, 128, 3, 1) | {"D": None, "state": None, "chunk": chunk}
    values["A"] = -torch.ones(3, 5)
    fast = (torch.arange(128) % 64 < 60) == fast_first
    mixed = torch.where(fast, 20.0, slow * (0.5 + torch.rand(128)))
    values["dt"] = torch.stack([torch.full((128,), 20.0), mixed, torch.rand(128) * slow], 1)[None]
    values["x"] *= torch.where(values["dt"] == 20, 1e-9, 1 / slow)  # otherwise the fast steps dominate y
    y, state = selective_scan(**values)
    expected, last = recurrence(**values)
    for channel in range(3):
        assert relative(y[:, :, channel], expected[:, :, channel]) <= 1e-4
        assert relative(state[:, channel], last[:, channel]) <= 1e-4


def test_tiles_of_the_default_length_equal_the_recurrence() -> None:
    values = inputs("selective_scan", 2, 70, 512, 2, size=16, scale=18)  # 32 positions per tile
    assert max(errors(values)) <= 1e-4


@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_gradients_in_fp32_equal_those_of_the_recurrence(scale: float) -> None:
    values = inputs("selective_scan", 2, 150) | {"chunk": 40}
    values["dt"] = values["dt"] ** 3 * scale + 1e-3
    tensors = [name for name, value in values.items() if name != "chunk"]
    actual, expected = (values | {name: values[name].clone().requires_grad_() for name in tensors} for _ in range(2))
    for run, leaves in ((selective_scan, actual), (recurrence, expected)):
        y, state = run(**leaves)
        torch.autograd.backward([y.sum(), (state * state).sum()])
    for name in tensors:
        assert relative(actual[name].grad, expected[name].grad.double()) <= 1e-3, name
