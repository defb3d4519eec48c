"""State-space duality (SSD) of Mamba-2: over a sequence in chunks, or one step for decoding.

The recurrence of each head, with B and C of its group:

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] ⊗ B[t]        h (P, S)
    y[t] = h[t] C[t] + D x[t]

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), §6.
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

__all__ = ["ssd", "ssd_step"]


def ssd(
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
    """Mamba-2's recurrence over whole sequences, differentiable.

    The torch backend computes in `promote_types(x.dtype, float32)`, with or without autocast; for the other backend see
    `ssmvl.ops.kernels`.

    Args:
        x: (B, L, H, P) inputs.
        dt: (B, L, H); the step sizes are clamp(softplus(dt + dt_bias), *dt_limit).
        A: (H,) negative rates.
        B: (B, L, G, S) input projections; G divides H.
        C: (B, L, G, S) output projections.
        D: (H,) skip weights.
        dt_bias: (H,).
        dt_softplus: whether to apply softplus; without it dt + dt_bias must not be negative.
        dt_limit: lowest and highest step size.
        state: (B, H, P, S), the state before the first position; zeros if None. Not with `segments`.
        lengths: (B,) number of real positions in each right-padded row; values in the padding must be finite. The
            returned state is the one after the last real position. Not with `segments`.
        segments: (B, L); the state is reset where the segment changes. The returned state is that of the last segment.
        chunk: positions per matrix product; affects speed, not results. Chosen by device and shape if None.
        backend: see `ssmvl.ops.backends`.

    Returns:
        y (B, L, H, P) in the dtype of `x`, and the state (B, H, P, S) in the computing dtype.

    Raises:
        ShapeError: shapes, lengths, segments, `dt_limit` or `chunk` are invalid, x is not floating-point, G does not
            divide H, or segments are given together with a state or lengths.
        BackendError: the requested backend does not support this call.
    """
    sequences = {"x": (x, "BLHP"), "dt": (dt, "BLH"), "B": (B, "BLGS"), "C": (C, "BLGS")}
    rest = {"A": (A, "H"), "D": (D, "H"), "dt_bias": (dt_bias, "H"), "state": (state, "BHPS")}
    sizes = check_axes("ssd", sequences | rest)
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    run = choose("ssd", x, {"float32 without TF32": exact}, backend)
    dt, A, D, state = prepare(
        "ssd", sizes, "H", x, dt, A, D, dt_bias, dt_softplus, dt_limit, state, lengths, segments, chunk
    )
    if sizes["L"] == 0:
        return x, x.new_zeros([sizes[a] for a in "BHPS"], dtype=dt.dtype) if state is None else state.clone()
    with without_autocast(x.device):
        y, state = run(x, dt, A, B, C, D, state, segments, chunk)
    return y.to(x.dtype), state


def ssd_step(
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
    """One position of `ssd`: x (B, H, P), dt (B, H), B and C (B, G, S) -> y (B, H, P); `state` advances in place.

    The other arguments are as in `ssd`. Gradients are not computed.

    Raises:
        ShapeError: shapes do not fit, G does not divide H, or `state` is not contiguous.
    """
    inputs = {"x": (x, "BHP"), "dt": (dt, "BH"), "B": (B, "BGS"), "C": (C, "BGS"), "state": (state, "BHPS")}
    sizes = check_axes("ssd_step", {**inputs, "A": (A, "H"), "D": (D, "H"), "dt_bias": (dt_bias, "H")})
    rows, groups = sizes["B"], sizes["G"]
    check_rows("ssd_step", rows, 1, None, None, x.device)
    check_groups("ssd_step", sizes["H"], groups)
    if not state.is_contiguous():
        raise ShapeError(
            "ssd_step: state is updated in place but is not contiguous; first set state = state.contiguous()"
        )
    dtype = state.dtype
    with without_autocast(x.device), torch.no_grad():
        x_cast, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
        dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, None)
        u = x_cast * dt[..., None]
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        decay = (dt * A).clamp_(min=LOWEST).exp_()[..., None, None]
        # A CPU processes one row at a time, so that each row's state is read from and written to memory only once.
        views = state, decay, u, y, B, C
        for h, through, u_, y_, B_, C_ in zip(*(t.split(rows if x.is_cuda else 1) for t in views), strict=True):
            matrix = h.mul_(through).view(len(h) * groups, -1, sizes["S"])
            column, row = u_.reshape(len(matrix), -1, 1), B_.reshape(len(matrix), 1, -1)
            torch.bmm(matrix.baddbmm_(column, row), C_.reshape(len(matrix), -1, 1), out=y_.view_as(column))
        if D is not None:
            y.addcmul_(x_cast, D.to(dtype)[:, None])
    return y.to(x.dtype)
