"""Adapters for the CUDA kernels, called through the public ops with stand-in kernels, equal the torch backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fake_kernels
import pytest
import torch
from oracle import SEQUENCES, Values, inputs

from ssmvl.errors import BackendError
from ssmvl.ops import backends
from ssmvl.ops.causal_conv import causal_conv
from ssmvl.ops.selective_scan import selective_scan
from ssmvl.ops.ssd import ssd

OPS: dict[str, Callable[..., Any]] = {"ssd": ssd, "selective_scan": selective_scan, "causal_conv": causal_conv}


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake_kernels.install(monkeypatch)
    torch.set_float32_matmul_precision("high")  # otherwise fp32 uses the torch backend
    for op, offer in backends.BACKENDS["mamba_ssm"].items():
        monkeypatch.setitem(backends.BACKENDS["mamba_ssm"], op, offer._replace(device=""))
    clear()
    yield
    torch.set_float32_matmul_precision("highest")
    clear()


def clear() -> None:
    backends._choose.cache_clear()
    backends._import_failure.cache_clear()


def convolution(rows: int = 2, length: int = 9, channels: int = 16, taps: int = 4) -> Values:
    shapes = {"x": (rows, length, channels), "weight": (channels, taps), "bias": (channels,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def assert_agree(op: str, values: Values, outputs: tuple[int, ...] = (0,)) -> None:
    """Compare the results of both backends, and the gradients of every tensor through these outputs."""
    leaves = {k: v.requires_grad_() for k, v in values.items() if torch.is_tensor(v) and v.is_floating_point()}
    by_backend = []
    for backend in ("mamba_ssm", "torch"):
        results = OPS[op](**values | leaves, backend=backend)
        total = sum(
            (results[index] * torch.linspace(-1, 1, results[index][0].numel()).view_as(results[index][0])).sum()
            for index in outputs
        )
        grads = torch.autograd.grad(total, tuple(leaves.values()), materialize_grads=True)
        by_backend.append([*results, *grads])
    for name, ours, theirs in zip(("y", "state", *leaves), *by_backend, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


MARKS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, -1, -1]])
CALLS: dict[str, tuple[str, Callable[[], Values]]] = {
    "ssd": ("ssd", lambda: inputs("ssd", 2, 9)),
    "ssd, one group": ("ssd", lambda: inputs("ssd", 2, 9, 4, 1)),
    "ssd, nothing optional": ("ssd", lambda: inputs("ssd", 2, 9) | {"D": None, "state": None}),
    "ssd, softplus": ("ssd", lambda: inputs("ssd", 2, 9) | {"dt_softplus": True, "dt_bias": torch.randn(4)}),
    "ssd, lengths": ("ssd", lambda: inputs("ssd", 3, 9) | {"lengths": torch.tensor([0, 4, 9])}),
    "ssd, segments": ("ssd", lambda: inputs("ssd", 2, 9) | {"state": None, "segments": MARKS}),
    "ssd, one position": ("ssd", lambda: inputs("ssd", 1, 1)),
    "scan": ("selective_scan", lambda: inputs("selective_scan", 2, 9)),
    "scan, one group": ("selective_scan", lambda: inputs("selective_scan", 2, 9, 4, 1)),
    "scan, four groups": ("selective_scan", lambda: inputs("selective_scan", 2, 9, 4, 4)),
    "scan, fast": ("selective_scan", lambda: inputs("selective_scan", 2, 9, scale=18)),
    "scan, nothing optional": ("selective_scan", lambda: inputs("selective_scan", 2, 9) | {"D": None, "state": None}),
    "scan, softplus": (
        "selective_scan",
        lambda: inputs("selective_scan", 2, 9) | {"dt_softplus": True, "dt_bias": torch.randn(4)},
    ),
    "scan, lengths": ("selective_scan", lambda: inputs("selective_scan", 3, 9) | {"lengths": torch.tensor([0, 4, 9])}),
    "scan, one position": ("selective_scan", lambda: inputs("selective_scan", 1, 1)),
    "conv": ("causal_conv", convolution),
    "conv, two taps": ("causal_conv", lambda: convolution(taps=2)),
    "conv, no bias": ("causal_conv", lambda: convolution() | {"bias": None}),
    "conv, a window": ("causal_conv", lambda: convolution() | {"window": torch.randn(2, 3, 16)}),
    "conv, lengths": ("causal_conv", lambda: convolution() | {"lengths": torch.tensor([0, 5])}),
    "conv, segments": ("causal_conv", lambda: convolution() | {"segments": MARKS}),
    "conv, one position": ("causal_conv", lambda: convolution(1, 1, 8) | {"window": torch.randn(1, 3, 8)}),
    "conv, shorter than the taps": ("causal_conv", lambda: convolution(2, 2) | {"window": torch.randn(2, 3, 16)}),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_adapters_equal_the_torch_backend(call: str) -> None:
    op, values = CALLS[call]
    assert_agree(op, values())


@pytest.mark.parametrize("state", [True, False])
def test_gradients_through_the_final_state(state: bool) -> None:
    values = inputs("ssd", 2, 9)
    assert_agree("ssd", values if state else values | {"state": None}, (0, 1))


@pytest.mark.parametrize("state", [True, False])
def test_the_scan_rejects_gradients_through_the_final_state(state: bool) -> None:
    values = inputs("selective_scan", 2, 9)
    x = values["x"].requires_grad_()
    _, last = selective_scan(**values | ({} if state else {"state": None}), backend="mamba_ssm")
    with pytest.raises(BackendError, match="no gradient through the final state"):
        torch.autograd.grad(last.sum(), x)


@pytest.mark.parametrize("op", ["ssd", "selective_scan"])
def test_bf16_inputs(op: str) -> None:
    values = inputs(op, 2, 9)
    values |= {name: values[name].bfloat16() for name in SEQUENCES}
    (y, state), (expected, last) = (OPS[op](**values, backend=backend) for backend in ("mamba_ssm", "torch"))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, expected, atol=0.1, rtol=0.02)
    torch.testing.assert_close(state, last, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("extra", ["window", "segments", "neither"])
@pytest.mark.parametrize("layout", ["part of a projection", "every other channel", "channels first"])
def test_the_convolution_of_any_layout(rows: int, length: int, extra: str, layout: str) -> None:
    x = {
        "part of a projection": lambda: torch.randn(rows, length, 19)[..., 3:11],
        "every other channel": lambda: torch.randn(rows, length, 16)[..., ::2],
        "channels first": lambda: torch.randn(rows, 8, length).transpose(1, 2),
    }[layout]()
    extras = {
        "window": {"window": torch.randn(rows, 3, 8)},
        "segments": {"segments": (torch.arange(2 * length) // 2).expand(rows, -1)[:, ::2]},
        "neither": {},
    }
    values = {"x": x, "weight": torch.randn(4, 8).t(), "bias": torch.randn(16)[::2], **extras[extra]}
    ours, theirs = (causal_conv(**values, backend=backend) for backend in ("mamba_ssm", "torch"))
    torch.testing.assert_close(ours, theirs)


def test_a_window_of_any_layout() -> None:
    values = convolution() | {"window": torch.randn(2, 16, 3).transpose(1, 2)}
    ours, theirs = (causal_conv(**values, backend=backend) for backend in ("mamba_ssm", "torch"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("op", ["ssd", "selective_scan"])
def test_scans_of_any_layout(op: str) -> None:
    values = inputs(op, 2, 9)
    strided = {name: value.mT.contiguous().mT if value.ndim > 1 else value for name, value in values.items()}
    ours, theirs = (OPS[op](**strided, backend=backend) for backend in ("mamba_ssm", "torch"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("op", "values", "reason"),
    [
        ("selective_scan", inputs("selective_scan", 2, 9) | {"state": None, "segments": MARKS}, "segments"),
        ("causal_conv", convolution(channels=12), "channels not divisible by 8"),
        ("causal_conv", convolution(taps=1), "a number of taps other than 2 to 4"),
        ("causal_conv", convolution(taps=5), "a number of taps other than 2 to 4"),
        ("ssd", {k: v.double() for k, v in inputs("ssd", 1, 3).items()}, "torch.float64"),
        ("causal_conv", {k: v.double() for k, v in convolution().items()}, "torch.float64"),
    ],
)
def test_calls_that_the_kernels_do_not_support(op: str, values: Values, reason: str) -> None:
    with pytest.raises(BackendError, match=f"it does not support {reason}") as error:
        OPS[op](**values, backend="mamba_ssm")
    assert "\n" not in str(error.value)
    torch.testing.assert_close(OPS[op](**values), OPS[op](**values, backend="torch"))


@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_raises(op: str) -> None:
    values = convolution() if op == "causal_conv" else inputs(op, 2, 9)
    x = values["x"].requires_grad_()
    y, _ = OPS[op](**values, backend="mamba_ssm")
    (first,) = torch.autograd.grad(y.sum() + x.pow(3).sum(), x, create_graph=True)
    with pytest.raises(BackendError, match="have no second derivative"):
        first.sum().backward()
