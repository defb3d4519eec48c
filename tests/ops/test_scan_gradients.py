"""Gradients of both state-space ops equal finite differences and the reference's; second derivatives raise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import Values, inputs, recurrence
from torch import Tensor

from ssmvl.errors import BackendError
from ssmvl.ops.causal_conv import causal_conv
from ssmvl.ops.rms_norm import rms_norm
from ssmvl.ops.selective_scan import selective_scan
from ssmvl.ops.ssd import ssd

OPS = {"ssd": ssd, "selective_scan": selective_scan}
both = pytest.mark.parametrize("op", OPS)


def small(op: str, rows: int = 2, length: int = 7, heads: int = 4, groups: int = 2) -> Values:
    return inputs(op, rows, length, heads, groups, width=2, size=2, dtype=torch.float64)


def assert_gradients(
    op: str, values: Values, pick: Callable[..., object] = lambda outputs: outputs, every_entry: bool = False
) -> None:
    """Compare with finite differences, along random directions or of every entry."""
    leaves = {k: v.requires_grad_() for k, v in values.items() if torch.is_tensor(v) and v.is_floating_point()}

    def run(*tensors: Tensor) -> object:
        return pick(OPS[op](**values | dict(zip(leaves, tensors, strict=True))))

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=not every_entry)


OPTIONS: dict[str, Values] = {
    "D and a state": {},
    "neither": {"D": None, "state": None},
    "softplus and a bias": {"dt_softplus": True, "dt_bias": torch.linspace(-1, 1, 4, dtype=torch.float64)},
    "lengths": {"lengths": torch.tensor([0, 5])},
    "segments": {"segments": torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 2, 2, 2, -1, -1]]), "state": None},
    "all but segments": {
        "lengths": torch.tensor([4, 7]),
        "dt_softplus": True,
        "dt_bias": torch.linspace(-1, 1, 4, dtype=torch.float64),
        "dt_limit": (0.2, 3.0),
    },
}


@both
@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(op: str, options: str, chunk: int) -> None:
    assert_gradients(op, small(op) | OPTIONS[options] | {"chunk": chunk})


@both
def test_gradcheck_of_every_entry(op: str) -> None:
    biased = {"dt_softplus": True, "dt_bias": torch.randn(2, dtype=torch.float64)}
    assert_gradients(op, small(op, 1, 7, 2, 1) | biased | {"chunk": 3}, every_entry=True)


@both
@pytest.mark.parametrize(("heads", "groups"), [(2, 1), (3, 3)])
@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (4, 1), (5, 2)])
def test_gradcheck_of_groups_and_chunks(op: str, heads: int, groups: int, length: int, chunk: int) -> None:
    assert_gradients(op, small(op, 1, length, heads, groups) | {"chunk": chunk})


@both
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("state", [True, False])
def test_gradcheck_through_one_output(op: str, output: int, state: bool) -> None:
    values = small(op, 1, 5, 2, 1)
    if not state:
        del values["state"]
    assert_gradients(op, values | {"chunk": 2}, lambda outputs: outputs[output])


@both
@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "state"])
def test_only_one_input_requires_a_gradient(op: str, name: str) -> None:
    values = small(op) | {"chunk": 3}
    assert_agree(op, values, [name], lambda y, h: (y * y).sum() + h.sum())


def assert_agree(op: str, values: Values, names: list[str], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Compare the op's gradients of `names` with those of the recurrence."""
    grads = []
    for run in (OPS[op], recurrence):
        leaves = {name: values[name].detach().requires_grad_() for name in names}
        total = loss(*run(**values | leaves))
        grads.append(torch.autograd.grad(total, tuple(leaves.values()), materialize_grads=True))
    for name, ours, theirs in zip(names, *grads, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a sum": lambda y, h: y.sum(),
    "a sum of the state": lambda y, h: h.sum(),
    "both sums": lambda y, h: y.sum() + h.sum(),
    "transposed": lambda y, h: (
        y.transpose(1, 2).contiguous().pow(2).sum() + h.transpose(1, 2).contiguous().pow(2).sum()
    ),
    "transposed, weighted": lambda y, h: (y.transpose(0, -1).reshape(-1) * torch.arange(y.numel())).sum(),
    "every other position": lambda y, h: y[:, ::2].pow(2).sum() + h[:, 1:].pow(2).sum(),
    "reversed": lambda y, h: y.flip(1).cumsum(1).pow(2).sum() + h.flip(-1).cumsum(-1).pow(2).sum(),
    "one number": lambda y, h: y[0, 3].sum() * h[1].sum(),
    "one row": lambda y, h: y[:1].expand(3, *y.shape[1:]).pow(2).sum(),
}


@both
@pytest.mark.parametrize("loss", LOSSES)
def test_incoming_gradients_of_any_layout(op: str, loss: str) -> None:
    values = small(op) | {"chunk": 3}
    assert_agree(op, values, [name for name in values if name != "chunk"], LOSSES[loss])


@both
def test_inputs_that_are_views_of_one_projection(op: str) -> None:
    values = small(op)
    names = ("x", "B", "C", "dt")
    sizes = [values[name][0, 0].numel() for name in names]
    loss = LOSSES["transposed"]

    def run(function: Callable[..., tuple[Tensor, Tensor]], projected: Tensor) -> Tensor:
        parts = zip(names, projected.split(sizes, -1), strict=True)
        views = {name: part.unflatten(-1, values[name].shape[2:]) for name, part in parts}
        return loss(*function(**values | views, dt_softplus=True, chunk=3))

    projected = torch.randn(2, 7, sum(sizes) + 3, dtype=torch.float64)[..., :-3].requires_grad_()
    ours, theirs = (torch.autograd.grad(run(function, projected), projected)[0] for function in (OPS[op], recurrence))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda t: run(OPS[op], t), (projected,), fast_mode=True)


def scattered(t: Tensor) -> Tensor:
    """The same values, with the axes reversed in memory and gaps between the elements."""
    reverse = [*reversed(range(t.ndim))]
    return torch.stack([t.permute(reverse), t.permute(reverse)], -1)[..., 0].permute(reverse)


@both
def test_inputs_of_any_layout(op: str) -> None:
    values = small(op) | {"dt_bias": torch.rand(4, dtype=torch.float64)}
    strided = {name: scattered(value) for name, value in values.items()}
    assert not any(value.is_contiguous() for value in strided.values())
    for ours, theirs in zip(OPS[op](**strided, chunk=3), recurrence(**values), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert_agree(op, strided | {"chunk": 3}, [*strided], LOSSES["transposed"])


@both
def test_expanded_inputs(op: str) -> None:
    values = small(op) | {"chunk": 3}
    one = torch.ones((), dtype=torch.float64)
    values |= {name: one.expand(values[name].shape) for name in ("dt", "B", "D")}
    values["A"] = -one.expand(values["A"].shape)
    values["state"] = values["state"][:1].expand_as(values["state"])
    assert_agree(op, values, ["x", "dt", "A", "B", "C", "D", "state"], LOSSES["both sums"])


@both
def test_very_long_decay_has_finite_gradients(op: str) -> None:
    for scale in (1e-10, 1e4, 1e6):
        values = {k: v.requires_grad_() for k, v in inputs(op, 1, 130, scale=scale).items()}
        y, state = OPS[op](**values)
        (y.sum() + state.sum()).backward()
        assert y.isfinite().all()
        assert all(value.grad.isfinite().all() for value in values.values())


def conv(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> Tensor:
    return causal_conv(x, weight, bias, window=window)[0]


def norm(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-5, gate)


def double(*sizes: int) -> Tensor:
    return torch.rand(sizes, dtype=torch.float64) + 0.1


def scan_of(op: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    values = {key: value for key, value in small(op).items() if torch.is_tensor(value)}
    if op == "selective_scan":
        del values["D"]  # its skip consists of torch ops, which have a correct second derivative
    return lambda *tensors: OPS[op](**dict(zip(values, tensors, strict=True)))[0], list(values.values())


ONCE: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "ssd": scan_of("ssd"),
    "selective_scan": scan_of("selective_scan"),
    "conv": (conv, [double(2, 9, 6), double(6, 4), double(6), double(2, 3, 6)]),
    "norm": (norm, [double(2, 300, 64), double(64), double(2, 300, 64)]),
}


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "square"])
@pytest.mark.parametrize(("op", "number"), [(op, number) for op, (_, t) in ONCE.items() for number in range(len(t))])
def test_a_second_derivative_raises_for_every_input(op: str, number: int, loss: Callable[..., Tensor]) -> None:
    run, tensors = ONCE[op]
    inputs = [t.clone().requires_grad_(index == number) for index, t in enumerate(tensors)]
    leaf = inputs[number]
    (first,) = torch.autograd.grad(loss(run(*inputs)), leaf, create_graph=True)
    (plain,) = torch.autograd.grad(loss(run(*inputs)), leaf)
    assert torch.equal(first, plain)
    if (
        first.requires_grad
    ):  # otherwise it does not depend on the input, such as the gradient of a sum with respect to D
        with pytest.raises(BackendError, match="have no second derivative"):
            torch.autograd.grad(first.sum(), leaf)
    # a direct path next to the op must not hide the error
    (mixed,) = torch.autograd.grad(loss(run(*inputs)) + leaf.pow(3).sum(), leaf, create_graph=True)
    with pytest.raises(BackendError, match="have no second derivative"):
        mixed.sum().backward()
