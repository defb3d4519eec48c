"""Connectors with bf16 weights and under autocast: dtypes, and values and gradients close to fp32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from ssmvl_mamba_vlm.connectors import MambaProjector
from ssmvl_ml_mamba.connectors import msc_advanced, msc_basic
from ssmvl_vl_mamba.connectors import vlmamba_mlp, vss_l2, vss_mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssmvl.connectors.projectors import MlpConnector
from ssmvl.interfaces import Grid
from ssmvl.layers.mamba2 import Mamba2Mixer

PRECISE = {"exp", "cumsum", "softplus"}
WIDTH, OUT, GRID = 32, 64, Grid(2, 9, 8)
MIXER = partial(Mamba2Mixer, d_state=16, head_dim=16)
CONNECTORS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MlpConnector,
    "msc_basic": partial(msc_basic, mixer=MIXER),
    "msc_advanced": partial(msc_advanced, mixer=MIXER),
    "vlmamba_mlp": vlmamba_mlp,
    "vss_mlp": vss_mlp,
    "vss_l2": vss_l2,
    "mamba_projector": MambaProjector,
}


class DtypeRecorder(TorchDispatchMode):
    """Records the input dtypes of the ops in PRECISE."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.__name__.partition(".")[0].rstrip("_") in PRECISE:
            self.dtypes.add(args[0].dtype)
        return op(*args, **(kwargs or {}))


@pytest.fixture(params=CONNECTORS)
def connector(request: pytest.FixtureRequest) -> nn.Module:
    """A connector in fp32 whose parameters are exact in bf16."""
    built = CONNECTORS[request.param](WIDTH, OUT, GRID)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) / 10 if parameter.ndim == 1 else 0)
            parameter.copy_(parameter.bfloat16())
    return built


def run(connector: nn.Module, x: Tensor, context: AbstractContextManager[object]) -> dict[str, Tensor]:
    """Run forward inside the context and backward outside; return the output, and the gradients by name."""
    x = x.clone().requires_grad_()
    with context:
        y = connector(x, GRID)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    inputs = {"the input": x, **dict(connector.named_parameters())}
    gradients = torch.autograd.grad((y.float() * weight).sum(), list(inputs.values()))
    return {"the output": y, **dict(zip(inputs, gradients, strict=True))}


def assert_near(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Check errors: 1.5% in the output, 10% per gradient, 2.5% on average; twice the errors of three seeds."""
    errors = {name: float((actual[name].float() - t).norm() / t.norm()) for name, t in exact.items()}
    assert errors.pop("the output") < 0.015
    assert all(error < 0.1 for error in errors.values()), errors  # False for NaN
    assert sum(errors.values()) / len(errors) < 0.025, errors


def dtypes(actual: dict[str, Tensor]) -> list[Any]:
    """The dtypes of the output, of the input's gradient, and of the parameters' gradients (as a set)."""
    output, x, *rest = (tensor.dtype for tensor in actual.values())
    return [output, x, set(rest)]


def test_bf16_weights_give_bf16_near_fp32(connector: nn.Module) -> None:
    x = torch.randn(2, GRID.length, WIDTH).bfloat16()
    exact = run(connector, x.float(), nullcontext())
    low = copy.deepcopy(connector).bfloat16()
    actual = run(low, x, nullcontext())
    assert dtypes(actual) == [torch.bfloat16, torch.bfloat16, {torch.bfloat16}]
    assert_near(actual, exact)
    cast = run(low, x.float(), nullcontext())  # fp32 features are cast to the dtype of the weights
    assert torch.equal(cast["the output"], actual["the output"])
    assert dtypes(cast) == [torch.bfloat16, torch.float32, {torch.bfloat16}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_bf16_near_fp32_and_gradients_in_fp32(connector: nn.Module, dtype: torch.dtype) -> None:
    """Features are bf16 from encoders that run under autocast, and fp32 from those that disable it."""
    x = torch.randn(2, GRID.length, WIDTH).bfloat16()
    exact = run(connector, x.float(), nullcontext())
    actual = run(connector, x.to(dtype), torch.autocast("cpu", torch.bfloat16))
    assert dtypes(actual) == [torch.bfloat16, dtype, {torch.float32}]
    assert_near(actual, exact)


@pytest.mark.parametrize("autocast", [True, False])
def test_exponentials_and_sums_never_run_in_bf16(connector: nn.Module, autocast: bool) -> None:
    low = connector if autocast else connector.bfloat16()
    with DtypeRecorder() as recorder:
        run(low, torch.randn(2, GRID.length, WIDTH), torch.autocast("cpu", torch.bfloat16, enabled=autocast))
    assert recorder.dtypes <= {torch.float32, torch.float64}
    assert bool(recorder.dtypes) == any(name.endswith("A_log") for name, _ in connector.named_parameters())
