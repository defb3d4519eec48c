"""Backends of the ops: one table, backend -> op -> callable, with the limits of each.

`auto` takes, for each call, the first backend in the table that supports it. The environment variable SSMVL_BACKEND or
an op's argument `backend` selects one by name; a call that it does not support raises an error with the reason.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from ssmvl.errors import BackendError, nearest


class Offer(NamedTuple):
    """Implementation of one op by one backend.

    Args:
        target: "module:attribute".
        needs: a module that must be importable.
        device: the device type it runs on; any if empty.
        unsupported: features of a call that it does not support.
    """

    target: str
    needs: str = ""
    device: str = ""
    unsupported: tuple[str, ...] = ()


def _kernel(op: str, needs: str, *unsupported: str) -> Offer:
    return Offer(f"ssmvl.ops.kernels:{op}", needs, "cuda", ("torch.float64", *unsupported))


BACKENDS: Mapping[str, Mapping[str, Offer]] = {
    "mamba_ssm": {
        "ssd": _kernel("ssd", "mamba_ssm", "float32 without TF32"),
        "selective_scan": _kernel("selective_scan", "mamba_ssm", "segments", "a state size above 256"),
        "causal_conv": _kernel(
            "causal_conv", "causal_conv1d", "channels not divisible by 8", "a number of taps other than 2 to 4"
        ),
    },
    "torch": {
        "ssd": Offer("ssmvl.ops.ssd_chunks:ssd"),
        "selective_scan": Offer("ssmvl.ops.selective_scan_tiles:selective_scan"),
        "causal_conv": Offer("ssmvl.ops.causal_conv_tiles:causal_conv"),
    },
}


def choose(
    op: str, x: Tensor, uses: Mapping[str, Tensor | bool | None], backend: str | None = None
) -> Callable[..., Any]:
    """Choose the implementation for one call.

    Args:
        op: an op of the table.
        x: the input, for its device and dtype.
        uses: features by their names in `Offer.unsupported`; the call uses those that are neither None nor False.
        backend: a backend of the table, "auto", or None for SSMVL_BACKEND, which defaults to "auto".

    Raises:
        BackendError: the backend is unknown, or does not support this call.
    """
    used = frozenset(name for name, value in uses.items() if value is not None and value is not False)
    requested = backend or os.environ.get("SSMVL_BACKEND") or "auto"
    return _choose(op, x.device.type, used | {str(x.dtype)}, requested)


@cache
def _choose(op: str, device: str, used: frozenset[str], requested: str) -> Callable[..., Any]:
    _check_name(requested)
    for name in BACKENDS if requested == "auto" else (requested,):
        offer = BACKENDS[name][op]
        reason = _unusable_reason(offer, device, used)
        if not reason:
            module, _, attribute = offer.target.partition(":")
            return getattr(importlib.import_module(module), attribute)
    raise BackendError(f"backend {requested!r} cannot run this call of {op}: {reason}; use 'auto' to allow others")


def _check_name(requested: str) -> None:
    if requested != "auto" and requested not in BACKENDS:
        raise BackendError(f"unknown backend {requested!r}.{nearest(requested, ('auto', *BACKENDS))}")


def _unusable_reason(offer: Offer, device: str, used: Iterable[str] = ()) -> str:
    if offer.device and device != offer.device:
        return f"it runs on {offer.device}, but the input is on {device}"
    unsupported = [name for name in offer.unsupported if name in used]
    if unsupported:
        return f"it does not support {' and '.join(unsupported)}"
    return _import_failure(offer.needs)


@cache
def _import_failure(module: str) -> str:
    try:
        if module:
            importlib.import_module(module)
    except Exception as error:  # third-party code may raise anything, e.g. without a GPU or with the wrong Triton
        return f"{module} cannot be imported ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return ""


def report(device: str) -> dict[str, dict[str, str]]:
    """Backend -> op -> reason that it is never used on `device`; "" if it is used for the calls that it supports."""
    return {name: {op: _unusable_reason(offer, device) for op, offer in ops.items()} for name, ops in BACKENDS.items()}


def describe(device: str) -> dict[str, str]:
    """Op -> a line that lists the backends tried on `device`, in order, and the reasons against the others."""
    requested = os.environ.get("SSMVL_BACKEND") or "auto"
    _check_name(requested)
    lines = {}
    for op in BACKENDS["torch"]:
        used, unusable = [], []
        for name, reasons in report(device).items():
            if reasons[op]:
                unusable.append(f"; not {name}: {reasons[op]}")
            elif requested in ("auto", name):
                unsupported = BACKENDS[name][op].unsupported
                used.append(name + (f" (unless a call uses {', '.join(unsupported)})" if unsupported else ""))
        lines[op] = f"{requested} = {', then '.join(used) or 'none'}{''.join(unusable)}"
    return lines
