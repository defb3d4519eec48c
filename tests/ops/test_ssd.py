from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Values, calls, inputs, recurrence, relative
from torch import Tensor

from ssmvl.ops.ssd import ssd


def errors(values: Values) -> tuple[float, float]:
    """Relative errors of y and of the state."""
    y, state = ssd(**values)
    expected, last = recurrence(**values)
    assert y.isfinite().all()
    assert state.isfinite().all()
    return relative(y, expected), relative(state, last)


@settings(deadline=None, max_examples=60)
@given(calls("ssd"))
def test_chunked_equals_recurrence(values: Values) -> None:
    assert max(errors(values)) <= 1e-4


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 50), st.floats(20, 1e6), st.booleans())
def test_faster_decays_are_accurate_to_a_thousandth(
    seed: int, length: int, chunk: int, largest: float, all_largest: bool
) -> None:
    torch.manual_seed(seed)
    values = inputs("ssd", 2, length)
    values["A"] = torch.tensor([-1.0, -0.5, -1e-6, -1.0])
    values["dt"] = values["dt"] * largest if not all_largest else torch.full_like(values["dt"], largest)
    assert max(errors(values | {"chunk": chunk})) <= 1e-3


def steps(pattern: str, length: int, slow: float) -> Tensor:
    """Step sizes (1, length, 3) of 20 and of about `slow`: one head is all fast, one is mixed, one is all slow."""
    position = torch.arange(length)
    fast = {
        "fast then slow": position < length * 15 // 16,
        "slow then fast": position >= length // 16,
        "one slow": position != length // 2,
        "fast, slow, fast": (position < length // 3) | (position >= length // 2),
        "alternating": position % 2 == 0,
    }[pattern]
    mixed = torch.where(fast, 20.0, slow * (0.5 + torch.rand(length)))
    return torch.stack([torch.full((length,), 20.0), mixed, torch.rand(length) * slow], 1)[None]


@pytest.mark.parametrize("chunk", [16, 64, 128, None, 256])  # 256: the default on a GPU
@pytest.mark.parametrize("slow", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("pattern", ["fast then slow", "slow then fast", "one slow", "fast, slow, fast", "alternating"])
def test_steps_of_20_next_to_steps_near_0(pattern: str, slow: float, chunk: int | None) -> None:
    length = 256
    values = inputs("ssd", 1, length, 3, 1) | {"A": -torch.ones(3), "D": None, "state": None, "chunk": chunk}
    values["dt"] = steps(pattern, chunk or 64, slow).repeat(1, length // (chunk or 64), 1)
    values["x"] *= torch.where(values["dt"] == 20, 1e-9, 1 / slow)[..., None]  # otherwise the fast steps dominate y
    y, state = ssd(**values)
    expected, last = recurrence(**values)
    for head in range(3):
        assert relative(y[:, :, head], expected[:, :, head]) <= 1e-4
        assert relative(state[:, head], last[:, head]) <= 1e-4


@pytest.mark.parametrize(("rate", "limit"), [(1.0, (1e-3, 0.1)), (16.0, (1e-3, 0.1)), (1.0, (1e-3, 20.0))])
def test_gradients_in_fp32_equal_those_of_the_recurrence(rate: float, limit: tuple[float, float]) -> None:
    values = inputs("ssd", 2, 150)
    values["A"] *= rate
    values["dt"] = values["dt"] ** 3 * limit[1] + limit[0]
    actual, expected = ({k: v.detach().clone().requires_grad_() for k, v in values.items()} for _ in range(2))
    for run, leaves in ((ssd, actual), (recurrence, expected)):
        y, state = run(**leaves)
        torch.autograd.backward([y.sum(), (state * state).sum()])
    for name, leaf in actual.items():
        assert relative(leaf.grad, expected[name].grad.double()) <= 1e-3, name
