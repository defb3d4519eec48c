"""Causal depthwise convolution over positions, with a window carried from call to call."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    window: Tensor | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y[t] = bias + sum_j weight[:, W-1-j] * x[t-j], positions before the start taken from `window`.

    Args:
        x: (B, L, C).
        weight: (C, W).
        bias: (C,).
        window: (B, W-1, C), the inputs before the first position; zeros if None.
        lengths: (B,) real positions of right-padded rows; the returned window ends there.
        segments: (B, L); a position never sees another segment.

    Returns:
        y (B, L, C) in the dtype of `x`, and the window (B, W-1, C) after each row's last real position.
    """
    rows, length, channels = x.shape
    reach = weight.shape[1] - 1
    if window is None:
        window = x.new_zeros(rows, reach, channels)
    padded = torch.cat([window.to(x.dtype), x], dim=1)
    y = x * weight[:, reach]
    for back in range(1, reach + 1):
        past = padded[:, reach - back : reach - back + length]
        if segments is not None and back < length:
            same = torch.cat([segments.new_zeros(rows, back) > 0, segments[:, back:] == segments[:, :-back]], dim=1)
            past = past * same[..., None]
        y = y + past * weight[:, reach - back]
    if bias is not None:
        y = y + bias
    if lengths is None:
        return y.to(x.dtype), padded[:, length:]
    places = lengths[:, None] + torch.arange(reach, device=x.device)
    return y.to(x.dtype), padded.gather(1, places[..., None].expand(-1, -1, channels))


def causal_conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor) -> Tensor:
    """One position of `causal_conv`: x (B, C) -> (B, C); shifts `window` (B, W-1, C) in place."""
    inputs = torch.cat([window.to(x.dtype), x[:, None]], dim=1)
    window.copy_(inputs[:, 1:])
    y = (inputs * weight.t()).sum(dim=1)
    return (y if bias is None else y + bias).to(x.dtype)
