"""Selective scan of Mamba-1: over a sequence, or one step for decoding.

The recurrence of each channel, with B and C of its group:

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]        h (S,)
    y[t] = h[t]·C[t] + D x[t]

Source: Gu and Dao, "Mamba" (arXiv 2312.00752), §3.2 and algorithm 2.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ssmvl.errors import ShapeError
from ssmvl.ops.backends import choose
from ssmvl.ops.checks import check_axes, check_groups, check_rows
from ssmvl.ops.precision import without_autocast
from ssmvl.ops.steps import LOWEST, prepare, step_sizes

__all__ = ["selective_scan", "selective_scan_step"]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's recurrence over whole sequences, differentiable.

    The torch backend computes in `promote_types(x.dtype, float32)`, with or without autocast; for the other backend see
    `ssmvl.ops.kernels`.

    Args:
        x: (B, L, E) inputs.
        dt: (B, L, E); the step sizes are clamp(softplus(dt + dt_bias), *dt_limit).
        A: (E, S) negative rates.
        B: (B, L, G, S) input projections; G divides E.
        C: (B, L, G, S) output projections.
        D: (E,) skip weights.
        dt_bias: (E,).
        dt_softplus: whether to apply softplus; without it dt + dt_bias must not be negative.
        dt_limit: lowest and highest step size.
        state: (B, E, S), the state before the first position; zeros if None. Not with `segments`.
        lengths: (B,) number of real positions in each right-padded row; values in the padding must be finite. The
            returned state is the one after the last real position. Not with `segments`.
        segments: (B, L); the state is reset where the segment changes. The returned state is that of the last segment.
        chunk: positions computed together; affects speed, not results. Chosen by shape if None.
        backend: see `ssmvl.ops.backends`.

    Returns:
        y (B, L, E) in the dtype of `x`, and the state (B, E, S) in the computing dtype.

    Raises:
        ShapeError: shapes, lengths, segments, `dt_limit` or `chunk` are invalid, x is not floating-point, G does not
            divide E, or segments are given together with a state or lengths.
        BackendError: the requested backend does not support this call.
    """
    sequences = {"x": (x, "BLE"), "dt": (dt, "BLE"), "B": (B, "BLGS"), "C": (C, "BLGS")}
    rest = {"A": (A, "ES"), "D": (D, "E"), "dt_bias": (dt_bias, "E"), "state": (state, "BES")}
    sizes = check_axes("selective_scan", sequences | rest)
    run = choose("selective_scan", x, {"segments": segments, "a state size above 256": sizes["S"] > 256}, backend)
    dt, A, D, state = prepare(
        "selective_scan", sizes, "E", x, dt, A, D, dt_bias, dt_softplus, dt_limit, state, lengths, segments, chunk
    )
    if sizes["L"] == 0:
        return x, x.new_zeros([sizes[a] for a in "BES"], dtype=dt.dtype) if state is None else state.clone()
    with without_autocast(x.device):
        y, state = run(x, dt, A, B, C, D, state, segments, chunk)
    return y.to(x.dtype), state


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
) -> Tensor:
    """One position of `selective_scan`: x, dt (B, E), B and C (B, G, S) -> y (B, E); `state` advances in place.

    The other arguments are as in `selective_scan`. Gradients are not computed.

    Raises:
        ShapeError: shapes do not fit, G does not divide E, or `state` is not contiguous.
    """
    inputs = {"x": (x, "BE"), "dt": (dt, "BE"), "B": (B, "BGS"), "C": (C, "BGS"), "state": (state, "BES")}
    sizes = check_axes("selective_scan_step", {**inputs, "A": (A, "ES"), "D": (D, "E"), "dt_bias": (dt_bias, "E")})
    rows, groups = sizes["B"], sizes["G"]
    check_rows("selective_scan_step", rows, 1, None, None, x.device)
    check_groups("selective_scan_step", sizes["E"], groups)
    if not state.is_contiguous():
        raise ShapeError(
            "selective_scan_step: state is updated in place but is not contiguous; first set state = state.contiguous()"
        )
    dtype = state.dtype
    with without_autocast(x.device), torch.no_grad():
        x_cast, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
        dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, None)
        state.mul_((dt[..., None] * A).clamp_(min=LOWEST).exp_())
        u = (x_cast * dt).reshape(rows, groups, -1, 1)
        by_group = state.view(rows, groups, -1, sizes["S"]).addcmul_(u, B[:, :, None])
        y = torch.matmul(by_group, C[..., None]).view(rows, sizes["E"])
        if D is not None:
            y.addcmul_(x_cast, D.to(dtype))
    return y.to(x.dtype)
