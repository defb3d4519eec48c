"""The parts of a bf16 run that stay in fp32, and the drift of its state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmvl.language.mamba_lm import Mamba1LM, MambaLM
from ssmvl.language.state import RecurrentState
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.ops.backends import choose
from ssmvl.ops.steps import step_sizes

PRECISE = {"exp", "exp_", "cumsum", "cumsum_", "softplus"}
Context = Callable[[], AbstractContextManager[object]]
Low = tuple[MambaLM, Context]


class Watch(TorchDispatchMode):
    """Collects the dtypes that reach each op in PRECISE."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.__name__.partition(".")[0]
        if name in PRECISE:
            self.seen.setdefault(name.rstrip("_"), set()).add(args[0].dtype)
        return op(*args, **(kwargs or {}))


@pytest.fixture(params=["autocast", "bf16 weights"])
def low(request: pytest.FixtureRequest, lm: MambaLM) -> Low:
    """A language model, and the context in which it runs in bf16."""
    if request.param == "autocast":
        return lm, partial(torch.autocast, "cpu", torch.bfloat16)
    return copy.deepcopy(lm).bfloat16(), nullcontext


def run(model: MambaLM, context: Context) -> RecurrentState:
    """Backbone forward and backward over a packed row, a prefill, 3 steps."""
    embeds, segments = torch.randn(2, 70, 8, requires_grad=True), packed(70)
    with context():
        hidden = model.backbone(embeds, segments)
    hidden.sum().backward(inputs=[embeds])
    state = model.new_state(2)
    with torch.no_grad(), context():
        model.prefill(embeds, torch.tensor([70, 41]), state)
        for t in range(3):
            model.step(embeds[:, t], state)
    return state


def packed(length: int) -> Tensor:
    return (torch.arange(length) >= length // 3).int().expand(2, -1)


def test_exponentials_and_sums_never_see_bf16(low: Low) -> None:
    model, context = low
    with Watch() as watch:
        run(model, context)
    assert watch.seen.keys() >= {"exp", "softplus"}
    assert ("cumsum" in watch.seen) == isinstance(model.layers[0].mixer, Mamba2Mixer)
    for op, dtypes in watch.seen.items():
        assert dtypes <= {torch.float32, torch.float64}, op


def test_step_sizes_rates_and_states_are_fp32(low: Low, monkeypatch: pytest.MonkeyPatch) -> None:
    model, context = low
    seen: dict[str, set[torch.dtype]] = {}

    def observed_steps(dt: Tensor, *rest: Any) -> Tensor:
        seen.setdefault("dt before softplus", set()).add(dt.dtype)
        return step_sizes(dt, *rest)

    def observed_choose(*arguments: Any) -> Callable[..., Any]:
        chosen = choose(*arguments)

        def observed(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *rest: Any) -> Any:
            for name, tensor in {"dt": dt, "A": A, "D": D, "state before": rest[0]}.items():
                seen.setdefault(name, set()).update(set() if tensor is None else {tensor.dtype})
            y, state = chosen(x, dt, A, B, C, D, *rest)
            seen.setdefault("state after", set()).add(state.dtype)
            return y, state

        return observed

    for op in ("ssd", "selective_scan"):
        monkeypatch.setattr(f"ssmvl.ops.{op}.step_sizes", observed_steps)
        monkeypatch.setattr(f"ssmvl.ops.{op}.choose", observed_choose)
    state = run(model, context)
    assert len(seen) == 6
    assert seen == {name: {torch.float32} for name in seen}
    assert {layer.ssm.dtype for layer in state.layers} == {torch.float32}


def test_backward_inside_autocast_equals_backward_outside(lm: MambaLM) -> None:
    embeds = torch.randn(2, 70, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = lm.backbone(embeds, packed(70))
        (inside,) = torch.autograd.grad(hidden.sum(), embeds, retain_graph=True)
    (outside,) = torch.autograd.grad(hidden.sum(), embeds)
    torch.testing.assert_close(inside, outside, atol=1e-5 * float(outside.abs().max()), rtol=0)


def drift(model: MambaLM) -> list[float]:
    """Relative error of the SSM states in bf16 autocast, compared with fp32, after each of 1,000 steps."""
    exact, rounded, errors = model.new_state(8), model.new_state(8), []
    with torch.no_grad():
        for _ in range(1000):
            embeds = torch.randn(8, model.width)
            model.step(embeds, exact)
            with torch.autocast("cpu", torch.bfloat16):
                model.step(embeds, rounded)
            pairs = zip(exact.layers, rounded.layers, strict=True)
            errors.append(max(float((low.ssm - high.ssm).norm() / high.ssm.norm()) for high, low in pairs))
    return errors


@pytest.mark.parametrize(
    ("kind", "mixer"),
    [(MambaLM, partial(Mamba2Mixer, d_state=16, head_dim=16)), (Mamba1LM, partial(Mamba1Mixer, d_state=16))],
)
def test_state_error_after_1000_steps_is_at_most_twice_that_after_100(
    kind: type[MambaLM], mixer: Callable[..., Any]
) -> None:
    errors = drift(kind(width=32, num_layers=1, num_tokens=20, mixer=mixer))
    early, late = (sum(errors[end - 20 : end]) / 20 for end in (100, 1000))
    assert 1e-4 < early < 0.05
    assert late < 2 * early
