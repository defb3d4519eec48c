"""Causal depthwise convolution over positions, then SiLU; a window carries the last inputs from call to call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmvl.errors import ShapeError
from ssmvl.ops.backends import choose
from ssmvl.ops.checks import check_axes, check_floats, check_rows
from ssmvl.ops.precision import without_autocast

__all__ = ["causal_conv", "causal_conv_step"]


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    window: Tensor | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y[t] = SiLU(bias + sum_j weight[:, W-1-j] * x[t-j]); x before the first position is `window`.

    Computes in `promote_types(x.dtype, float32)`, with or without autocast.

    Args:
        x: (B, L, C).
        weight: (C, W).
        bias: (C,).
        window: (B, W-1, C), the inputs before the first position; zeros if None. Not with `segments`.
        lengths: (B,) number of real positions in each right-padded row; the returned window ends after them.
        segments: (B, L); a position never sees another segment.
        backend: see `ssmvl.ops.backends`.

    Returns:
        y (B, L, C) and the window (B, W-1, C) after each row's last real position, both in the dtype of `x`.

    Raises:
        ShapeError: shapes, lengths or segments do not fit, or both a window and segments are given.
        BackendError: the requested backend does not support this call.
    """
    sizes = check_axes("causal_conv", {"x": (x, "BLC"), "weight": (weight, "CW"), "bias": (bias, "C")})
    rows, length, channels, taps = (sizes[a] for a in "BLCW")
    check_axes("causal_conv", {"window": (window, "BVC")}, {**sizes, "V": taps - 1})
    check_floats("causal_conv", x)
    check_rows("causal_conv", rows, length, lengths, segments, x.device)
    if window is not None and segments is not None:
        raise ShapeError("causal_conv: window and segments are mutually exclusive; packed rows start from zeros")
    uses = {
        "channels not divisible by 8": channels % 8 != 0,
        "a number of taps other than 2 to 4": not 2 <= taps <= 4,
    }
    run = choose("causal_conv", x, uses, backend)
    before = x.new_zeros(rows, taps - 1, channels) if window is None else window.to(x.dtype, copy=length == 0)
    if length == 0:
        return x, before
    with without_autocast(x.device):
        y = run(x, weight, bias, window, segments)
    return y.to(x.dtype), _window(x, before, lengths)


def causal_conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor) -> Tensor:
    """One position of `causal_conv`: x (B, C) -> (B, C); shifts `window` (B, W-1, C) in place. No gradients.

    Raises:
        ShapeError: shapes do not fit.
    """
    sizes = check_axes("causal_conv_step", {"x": (x, "BC"), "weight": (weight, "CW"), "bias": (bias, "C")})
    check_axes("causal_conv_step", {"window": (window, "BVC")}, {**sizes, "V": sizes["W"] - 1})
    check_rows("causal_conv_step", sizes["B"], 1, None, None, x.device)
    with without_autocast(x.device), torch.no_grad():
        dtype = torch.promote_types(x.dtype, torch.float32)
        inputs = torch.cat([window.to(dtype), x.to(dtype)[:, None]], dim=1)
        window.copy_(inputs[:, 1:])
        y = (inputs * weight.t()).sum(dim=1)
        y = F.silu(y if bias is None else y.add_(bias), inplace=True)
    return y.to(x.dtype)


def _window(x: Tensor, before: Tensor, lengths: Tensor | None) -> Tensor:
    """The last W-1 inputs (B, W-1, C) of each row, taken from `before` followed by `x`."""
    reach, length = before.shape[1], x.shape[1]
    if lengths is None:
        return torch.cat([before, x[:, max(0, length - reach) :]], dim=1)[:, -reach:] if reach else before
    index = (lengths[:, None] + torch.arange(reach, device=x.device))[..., None].expand_as(before)
    old, new = before.gather(1, index.clamp(max=reach - 1)), x.gather(1, (index - reach).clamp(min=0))
    return torch.where(index < reach, old, new)
