"""Every backend that this machine can run computes every op as the fp64 reference in `oracle`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import SEQUENCES, Values, convolution, inputs, recurrence, relative
from torch import Tensor

from ssmvl.ops import backends
from ssmvl.ops.causal_conv import causal_conv
from ssmvl.ops.selective_scan import selective_scan
from ssmvl.ops.ssd import ssd

OPS: dict[str, Callable[..., Any]] = {"ssd": ssd, "selective_scan": selective_scan, "causal_conv": causal_conv}
TOLERANCE = {"torch": 1e-4}  # of the maximum; kernels may multiply in tf32
LENGTH = 70
MARKS = torch.tensor([[0] * 9 + [1] * 40 + [2] * 21, [0] * 33 + [1] * 30 + [-1] * 7])
CASES: dict[str, Values] = {
    "plain": {},
    "one group": {},
    "lengths": {"lengths": torch.tensor([0, 41])},
    "segments": {"segments": MARKS},
    "a state": {},
    "a state and lengths": {"lengths": torch.tensor([70, 3])},
    "bf16": {},
}


def call(op: str, case: str) -> Values:
    if op == "causal_conv":
        shapes = {"x": (2, LENGTH, 16), "weight": (16, 4), "bias": (16,), "window": (2, 3, 16)}
        values = {name: torch.randn(shape) for name, shape in shapes.items()}
        sequences: tuple[str, ...] = ("x",)
    else:
        values = inputs(op, 2, LENGTH, 4, 1 if case == "one group" else 2, width=16, size=16)
        sequences = SEQUENCES
    if "state" not in case:
        values = {name: value for name, value in values.items() if name not in ("state", "window")}
    if case == "bf16":
        values |= {name: values[name].bfloat16() for name in sequences}
    return values | CASES[case]


def not_run(backend: str, op: str, values: Values) -> str:
    """Reason that this call is not run, or ""."""
    offer = backends.BACKENDS[backend][op]
    device = offer.device or "cpu"
    if reason := backends.report(device)[backend][op]:
        return reason
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    names = {"window": "a window"}
    return backends._unusable_reason(offer, device, {names.get(name, name) for name in values})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_a_backend_equals_the_reference(
    backend: str, op: str, case: str, record_property: Callable[[str, object], None]
) -> None:
    values = call(op, case)
    reason = not_run(backend, op, values)
    if reason:
        record_property("not run", f"backend {backend}, {op}: {reason}")
        pytest.skip(f"backend {backend} is not run for {op}: {reason}")
    device = backends.BACKENDS[backend][op].device or "cpu"
    tensors = [name for name, value in values.items() if value.is_floating_point()]
    moved = {name: value.detach().to(device) for name, value in values.items()}
    exact = {name: value.double() if name in tensors else value for name, value in values.items()}
    actual = results(lambda **arguments: OPS[op](**arguments, backend=backend), moved, tensors)
    expected = results(convolution if op == "causal_conv" else recurrence, exact, tensors)
    tolerance = 0.02 if case == "bf16" else TOLERANCE.get(backend, 1e-2)
    for name, value in expected.items():
        assert relative(actual[name].cpu(), value) <= tolerance, name


def results(run: Callable[..., tuple[Tensor, Tensor]], values: Values, tensors: list[str]) -> dict[str, Tensor]:
    """The defined part of the outputs, and the gradients of the tensors through it."""
    leaves = {name: values[name].clone().requires_grad_() for name in tensors}
    y, state = run(**values | leaves)
    defined = {"y": y, "last state": state}
    if "lengths" in values:
        defined["y"] = y[torch.arange(LENGTH, device=y.device) < values["lengths"][:, None]]
    if "segments" in values:
        defined = {"y": y[values["segments"] >= 0]}
    total = sum(value.float().square().sum() for value in defined.values())
    grads = torch.autograd.grad(total, tuple(leaves.values()), materialize_grads=True)
    return defined | dict(zip(tensors, grads, strict=True))
