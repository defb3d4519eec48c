"""Which implementation of an op is used: one table, backend -> op -> callable, with what each cannot do.

`auto` takes, for each call, the first backend of the table that can do it. The environment variable SSMVL_BACKEND, or
an op's argument `backend`, asks for one by name; a call which that one cannot do is an error that says why.
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
    """One op of one backend.

    Args:
        target: "module:attribute".
        needs: a module that must be importable.
        device: the type of device it runs on; any if empty.
        cannot: what a call may use that it does not take.
    """

    target: str
    needs: str = ""
    device: str = ""
    cannot: tuple[str, ...] = ()


def _kernel(op: str, needs: str, *cannot: str) -> Offer:
    return Offer(f"ssmvl.ops.kernels:{op}", needs, "cuda", ("torch.float64", *cannot))


BACKENDS: Mapping[str, Mapping[str, Offer]] = {
    "mamba_ssm": {
        "ssd": _kernel("ssd", "mamba_ssm", "float32 where TF32 is not allowed"),
        "selective_scan": _kernel("selective_scan", "mamba_ssm", "segments", "more than 256 states"),
        "causal_conv": _kernel("causal_conv", "causal_conv1d", "channels no multiple of 8", "taps other than 2 to 4"),
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
    """The implementation for one call.

    Args:
        op: a name of the table.
        x: the input, for its device and dtype.
        uses: what the call uses, by the names of `Offer.cannot`; an entry that is None or False is not used.
        backend: a name of the table, "auto", or None for SSMVL_BACKEND, "auto" where that is not set.

    Raises:
        BackendError: no such backend, or it cannot do this call.
    """
    used = frozenset(name for name, value in uses.items() if value is not None and value is not False)
    wanted = backend or os.environ.get("SSMVL_BACKEND") or "auto"
    return _choose(op, x.device.type, used | {str(x.dtype)}, wanted)


@cache
def _choose(op: str, device: str, used: frozenset[str], wanted: str) -> Callable[..., Any]:
    _check_name(wanted)
    for name in BACKENDS if wanted == "auto" else (wanted,):
        offer = BACKENDS[name][op]
        reason = _why_not(offer, device, used)
        if not reason:
            module, _, attribute = offer.target.partition(":")
            return getattr(importlib.import_module(module), attribute)
    raise BackendError(f"backend {wanted!r} cannot do this call of {op}: {reason}; allow another with backend 'auto'")


def _check_name(wanted: str) -> None:
    if wanted != "auto" and wanted not in BACKENDS:
        raise BackendError(f"no backend {wanted!r}.{nearest(wanted, ('auto', *BACKENDS))}")


def _why_not(offer: Offer, device: str, used: Iterable[str] = ()) -> str:
    if offer.device and device != offer.device:
        return f"it runs on {offer.device}, the input is on {device}"
    refused = [name for name in offer.cannot if name in used]
    if refused:
        return f"it does not take {' and '.join(refused)}"
    return _why_missing(offer.needs)


@cache
def _why_missing(module: str) -> str:
    try:
        if module:
            importlib.import_module(module)
    except Exception as error:  # foreign code: a missing GPU, or a Triton that does not fit, raises what it likes
        return f"{module} cannot be imported ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return ""


def report(device: str) -> dict[str, dict[str, str]]:
    """Backend -> op -> why it is never used on `device`; "" where it is, for the calls that it takes."""
    return {name: {op: _why_not(offer, device) for op, offer in ops.items()} for name, ops in BACKENDS.items()}


def describe(device: str) -> dict[str, str]:
    """Op -> a line that says which backends it tries on `device`, in their order, and why not the others."""
    wanted = os.environ.get("SSMVL_BACKEND") or "auto"
    _check_name(wanted)
    lines = {}
    for op in BACKENDS["torch"]:
        used, refused = [], []
        for name, reasons in report(device).items():
            if reasons[op]:
                refused.append(f"; not {name}: {reasons[op]}")
            elif wanted in ("auto", name):
                cannot = BACKENDS[name][op].cannot
                used.append(name + (f" (unless a call uses {', '.join(cannot)})" if cannot else ""))
        lines[op] = f"{wanted} = {', then '.join(used) or 'none'}{''.join(refused)}"
    return lines
