from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmvl.ops import rms_norm as module
from ssmvl.ops.rms_norm import rms_norm

EPS = 1e-5


@pytest.fixture(params=["small", "tiles"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two implementations."""
    monkeypatch.setattr(module, "SMALL", -1 if request.param == "tiles" else 2**30)
    monkeypatch.setattr(module, "TILE", 3)
    return request.param


def formula(x: Tensor, weight: Tensor, gate: Tensor | None = None, groups: int = 1, eps: float = EPS) -> Tensor:
    x, weight = x.double(), weight.double()
    if gate is not None:
        gate = gate.double()
        gate = gate.unsqueeze(-2) if gate.ndim < x.ndim else gate
        x = x * gate / (1 + torch.exp(-gate))
    parts = [part / (part.square().mean(-1, keepdim=True) + eps).sqrt() for part in x.chunk(groups, -1)]
    return torch.cat(parts, -1) * weight


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "no gate": ((2, 5, 12), None),
    "a gate": ((2, 5, 12), (2, 5, 12)),
    "two paths share a gate": ((2, 5, 2, 12), (2, 5, 12)),
    "four paths share a gate": ((7, 4, 12), (7, 12)),
    "one path": ((2, 5, 1, 12), (2, 5, 12)),
    "four axes without a gate": ((2, 2, 3, 12), None),
    "one token": ((12,), (12,)),
}
cases = pytest.mark.parametrize("case", CASES)
by_groups = pytest.mark.parametrize("groups", [1, 3, 12])


def tensors(case: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x, gate = CASES[case]
    shapes = [x, (12,), *([] if gate is None else [gate])]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@cases
@by_groups
def test_equals_the_formula(path: str, case: str, groups: int) -> None:
    x, weight, *gate = tensors(case)
    y = rms_norm(x, weight, EPS, *gate, groups=groups)
    assert (y.shape, y.dtype) == (x.shape, torch.float32)
    torch.testing.assert_close(y, formula(x, weight, *gate, groups=groups).float(), atol=1e-5, rtol=1e-5)


@cases
@by_groups
def test_gradcheck(path: str, case: str, groups: int) -> None:
    inputs = tuple(t.requires_grad_() for t in tensors(case, torch.float64))

    def run(x: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        return rms_norm(x, weight, EPS, gate, groups)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@cases
@by_groups
def test_gradients_equal_those_of_the_formula(path: str, case: str, groups: int) -> None:
    inputs = tuple(t.requires_grad_() for t in tensors(case, torch.float64))
    x, weight, *gate = inputs
    grads = []
    for y in (rms_norm(x, weight, EPS, *gate, groups=groups), formula(x, weight, *gate, groups=groups)):
        loss = y.sum() + y.transpose(0, -1).contiguous().cumsum(0).square().sum()
        grads.append(torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(*grads)


def test_every_entry_of_the_gradients(path: str) -> None:
    x, weight, gate = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 2, 4), (4,), (5, 4)))
    inputs = tuple(t.requires_grad_() for t in (x, weight, gate))
    assert torch.autograd.gradcheck(lambda a, b, c: rms_norm(a, b, EPS, c, 2), inputs)


def test_both_implementations_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, gate = torch.randn(40, 2, 12), torch.randn(12), torch.randn(40, 12)
    small = rms_norm(x, weight, EPS, gate, 3)
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(module, "TILE", 3)
    torch.testing.assert_close(rms_norm(x, weight, EPS, gate, 3), small)


def test_inputs_of_any_layout(path: str) -> None:
    projected = torch.randn(6, 5, 30, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(24, dtype=torch.float64)[::2].requires_grad_()
    x, gate = projected[..., :12], projected[..., 15:27]
    grads = []
    for function in (rms_norm, formula):
        arguments = {"eps": EPS, "gate": gate.transpose(0, 1), "groups": 2}
        y = function(x.transpose(0, 1), weight, **arguments)
        grads.append(torch.autograd.grad(y.square().sum(), (projected, weight)))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-3, 1e15])
def test_small_and_large_inputs_stay_finite(path: str, scale: float) -> None:
    x = (torch.randn(5, 12) * scale).requires_grad_()
    weight = torch.randn(12)
    y = rms_norm(x, weight, EPS, groups=3)
    torch.testing.assert_close(y, formula(x, weight, groups=3).float(), atol=1e-5, rtol=1e-4)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()


def test_no_tokens(path: str) -> None:
    x = torch.randn(0, 2, 12, requires_grad=True)
    y = rms_norm(x, torch.ones(12), EPS, torch.randn(0, 12))
    assert y.shape == x.shape
    y.sum().backward()


def test_dtypes(path: str) -> None:
    x, weight, gate = torch.randn(5, 12), torch.randn(12), torch.randn(5, 12)
    expected = rms_norm(x, weight, EPS, gate)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rms_norm(x, weight, EPS, gate), expected)
    assert rms_norm(x.bfloat16(), weight, EPS, gate.bfloat16()).dtype == torch.float32
    halved = rms_norm(x.bfloat16(), weight.bfloat16(), EPS, gate.bfloat16())
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), expected, atol=0.05, rtol=0.05)


@by_groups
def test_gradients_under_autocast_equal_those_without(path: str, groups: int) -> None:
    inputs = [t.requires_grad_() for t in tensors("two paths share a gate")]
    grads = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = rms_norm(inputs[0], inputs[1], EPS, inputs[2], groups)
            grads.append(torch.autograd.grad(y.square().sum(), inputs))
    assert all(map(torch.equal, *grads))
