from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import fake_kernels
import pytest
import torch
from oracle import inputs

from ssmvl.errors import BackendError
from ssmvl.ops import backends, causal_conv_tiles, kernels, selective_scan_tiles, ssd_chunks
from ssmvl.ops.ssd import ssd

OPS = ("ssd", "selective_scan", "causal_conv")
TORCH = {
    "ssd": ssd_chunks.ssd,
    "selective_scan": selective_scan_tiles.selective_scan,
    "causal_conv": causal_conv_tiles.causal_conv,
}
every_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SSMVL_BACKEND", raising=False)
    clear()
    yield
    clear()


def clear() -> None:
    backends._choose.cache_clear()
    backends._import_failure.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kernels.install(monkeypatch)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, None)


def tensor_on(device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Stand-in for a tensor on `device`."""
    return cast(torch.Tensor, SimpleNamespace(device=torch.device(device), dtype=dtype))


def error_message(op: str, x: torch.Tensor, uses: dict[str, bool], backend: str | None = None) -> str:
    with pytest.raises(BackendError) as error:
        backends.choose(op, x, uses, backend)
    assert "\n" not in str(error.value)
    return str(error.value)


@every_op
@pytest.mark.parametrize(
    ("variable", "argument"),
    [
        (None, None),
        (None, "auto"),
        (None, "torch"),
        ("auto", None),
        ("torch", None),
        ("", None),
        ("nonsense", "torch"),
        ("mamba_ssm", "auto"),
        ("mamba_ssm", "torch"),
    ],
)
def test_torch_on_a_cpu(op: str, variable: str | None, argument: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable is not None:
        monkeypatch.setenv("SSMVL_BACKEND", variable)
    assert backends.choose(op, tensor_on("cpu"), {}, argument) is TORCH[op]


@every_op
@pytest.mark.parametrize(("variable", "argument"), [("mamba_ssm", None), (None, "mamba_ssm"), ("torch", "mamba_ssm")])
def test_kernels_on_a_cpu_are_rejected(
    op: str, variable: str | None, argument: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("SSMVL_BACKEND", variable)
    message = error_message(op, tensor_on("cpu"), {}, argument)
    assert "'mamba_ssm'" in message
    assert op in message
    assert "it runs on cuda, but the input is on cpu" in message
    assert "'auto'" in message


@pytest.mark.parametrize(("name", "hint"), [("nonsense", ""), ("Torch", "Did you mean 'torch'?"), ("mamba", "")])
@pytest.mark.parametrize("by", ["variable", "argument"])
def test_unknown_names(name: str, hint: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "variable":
        monkeypatch.setenv("SSMVL_BACKEND", name)
    message = error_message("ssd", tensor_on("cpu"), {}, name if by == "argument" else None)
    assert repr(name) in message
    assert hint in message
    assert "Allowed: auto, mamba_ssm, torch." in message


def test_the_variable_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "nonsense", "torch"):
        monkeypatch.setenv("SSMVL_BACKEND", name)
        if name == "torch":
            assert backends.choose("ssd", tensor_on("cpu"), {}) is TORCH["ssd"]
        else:
            error_message("ssd", tensor_on("cpu"), {})


@every_op
def test_installed_kernels_are_used_on_cuda(op: str, installed: None) -> None:
    for argument in (None, "auto", "mamba_ssm"):
        assert backends.choose(op, tensor_on("cuda"), {}, argument) is getattr(kernels, op)
    assert backends.choose(op, tensor_on("cuda"), {}, "torch") is TORCH[op]


@pytest.mark.parametrize(
    ("op", "uses", "dtype", "reason"),
    [
        ("ssd", {}, torch.float64, "torch.float64"),
        ("selective_scan", {}, torch.float64, "torch.float64"),
        ("causal_conv", {}, torch.float64, "torch.float64"),
        ("selective_scan", {"segments": True}, torch.float32, "segments"),
        ("selective_scan", {"a state size above 256": True}, torch.float32, "a state size above 256"),
        ("ssd", {"float32 without TF32": True}, torch.float32, "float32 without TF32"),
        ("causal_conv", {"channels not divisible by 8": True}, torch.float32, "channels not divisible by 8"),
        (
            "causal_conv",
            {"a number of taps other than 2 to 4": True},
            torch.float32,
            "a number of taps other than 2 to 4",
        ),
    ],
)
def test_calls_that_the_kernels_do_not_support(
    op: str, uses: dict[str, bool], dtype: torch.dtype, reason: str, installed: None
) -> None:
    assert backends.choose(op, tensor_on("cuda", dtype), uses) is TORCH[op]
    assert f"it does not support {reason}" in error_message(op, tensor_on("cuda", dtype), uses, "mamba_ssm")


@pytest.mark.parametrize(
    ("op", "uses"),
    [
        ("ssd", {"float32 without TF32": False}),
        ("selective_scan", {"segments": None}),
        ("causal_conv", {"channels not divisible by 8": False, "a number of taps other than 2 to 4": None}),
    ],
)
def test_calls_that_the_kernels_support(op: str, uses: dict[str, bool], installed: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert backends.choose(op, tensor_on("cuda", dtype), uses, "mamba_ssm") is getattr(kernels, op)


@every_op
def test_packages_that_are_not_installed(op: str, not_installed: None) -> None:
    assert backends.choose(op, tensor_on("cuda"), {}) is TORCH[op]
    package = "causal_conv1d" if op == "causal_conv" else "mamba_ssm"
    assert f"{package} cannot be imported (ModuleNotFoundError" in error_message(op, tensor_on("cuda"), {}, "mamba_ssm")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("raise RuntimeError('no driver\\nsecond line')", "(RuntimeError: no driver)"),
        ("raise OSError('undefined symbol')", "(OSError: undefined symbol)"),
        ("raise ImportError", "(ImportError"),
    ],
)
def test_packages_that_fail_to_import(line: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mamba_ssm.py").write_text(line)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mamba_ssm", raising=False)
    assert backends.choose("ssd", tensor_on("cuda"), {}) is TORCH["ssd"]
    assert reason in error_message("ssd", tensor_on("cuda"), {}, "mamba_ssm")


def test_report(installed: None) -> None:
    usable = dict.fromkeys(OPS, "")
    assert backends.report("cuda") == {"mamba_ssm": usable, "torch": usable}
    unusable = dict.fromkeys(OPS, "it runs on cuda, but the input is on cpu")
    assert backends.report("cpu") == {"mamba_ssm": unusable, "torch": usable}


def test_report_of_packages_that_are_not_installed(not_installed: None) -> None:
    report = backends.report("cuda")
    assert report["torch"] == dict.fromkeys(OPS, "")
    for op, reason in report["mamba_ssm"].items():
        assert reason.startswith("causal_conv1d" if op == "causal_conv" else "mamba_ssm")
        assert "cannot be imported" in reason
        assert "\n" not in reason


@every_op
def test_implementations_of_an_op_take_the_same_arguments(op: str) -> None:
    parameters = []
    for offers in backends.BACKENDS.values():
        module, _, name = offers[op].target.partition(":")
        parameters.append([*inspect.signature(getattr(import_module(module), name)).parameters])
    assert parameters[0] == parameters[1]


def test_the_ops_pass_on_their_backend_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    values = inputs("ssd", 1, 4)
    with pytest.raises(BackendError, match="unknown backend 'nonsense'"):
        ssd(**values, backend="nonsense")
    monkeypatch.setenv("SSMVL_BACKEND", "mamba_ssm")
    with pytest.raises(BackendError, match="the input is on cpu"):
        ssd(**values)
    assert torch.equal(ssd(**values, backend="torch")[0], ssd(**values, backend="auto")[0])
