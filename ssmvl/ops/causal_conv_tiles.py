"""Causal convolution of the torch backend, over tiles that stay in the cache.

On a CPU, oneDNN's depthwise convolution computes each tile. Where it cannot (segments, fp64, GPUs), a tile is a sum of
shifted multiply-adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmvl.ops.precision import backward_without_autocast


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, segments: Tensor | None
) -> Tensor:
    """The op `ssmvl.ops.causal_conv.causal_conv` for L >= 1, in the computing dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    reach = weight.shape[1] - 1
    same = None
    if segments is not None:  # (W-1, B, L, 1): 1 where the input `reach - j` positions back is in the same segment
        shifted = [F.pad(segments, [reach - j, 0], value=-2)[:, : x.shape[1]] for j in range(reach)]
        same = (torch.stack([segments, *shifted])[1:] == segments)[..., None].to(dtype)
    inputs = (None if t is None else t.to(dtype) for t in (x, weight.t(), bias, window))
    return _CausalConv.apply(*inputs, same)


class _CausalConv(torch.autograd.Function):
    """Saves only its inputs; backward recomputes the sum before SiLU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None, window: Tensor | None, same: Tensor | None
    ) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for span, padded, mask in _tiles(x, taps, window, same):
            torch.ops.aten.silu.out(_sum(padded, taps, bias, mask), out=y[:, span])
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, taps, bias, window, same)
        return y

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, bias, window, same = ctx.saved_tensors
        reach = len(taps) - 1
        dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        d_taps = torch.zeros_like(taps, memory_format=torch.contiguous_format)
        d_bias, d_window = (None if t is None else torch.zeros_like(t) for t in (bias, window))
        for span, padded, mask in _tiles(x, taps, window, same):
            d_sum = torch.ops.aten.silu_backward(dy[:, span], _sum(padded, taps, bias, mask))
            if d_bias is not None:
                d_bias += d_sum.sum((0, 1))
            for j in range(reach + 1):
                d_taps[j] += (_masked(d_sum, mask, j) * padded[:, j : j + d_sum.shape[1]]).sum((0, 1))
            d_padded, first = _spread(d_sum, taps, mask), span.start - reach
            in_window = max(0, -first)  # inputs of this tile that precede x
            dx[:, first + in_window : span.stop] += d_padded[:, in_window:]
            if in_window and d_window is not None:
                d_window[:, reach - in_window :] += d_padded[:, :in_window]
        return dx, d_taps, d_bias, d_window, None


def _tiles(
    x: Tensor, taps: Tensor, window: Tensor | None, same: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield for each tile its slice, the inputs (B, n+W-1, C) of its n outputs, and the mask (W-1, B, n, 1)."""
    (rows, length, channels), reach = x.shape, len(taps) - 1
    first = min(reach, length)
    tile = max(64, 2**18 // (rows * channels)) if x.is_cpu else length  # about 1 MiB where rows are few
    bounds = [(0, first)] if first else []
    bounds += [(start, min(start + tile, length)) for start in range(first, length, tile)]
    for start, stop in bounds:
        if start < reach:
            before = x.new_zeros(rows, reach, channels) if window is None else window
            padded = torch.cat([before, x[:, :stop]], dim=1)
        else:
            padded = x[:, start - reach : stop]
        yield slice(start, stop), padded, None if same is None else same[:, :, start:stop]


def _sum(padded: Tensor, taps: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """Bias + sum_j taps[j] * padded[:, j:], (B, n+W-1, C) -> (B, n, C)."""
    if _fits_onednn(padded, mask):
        return _depthwise(padded, taps, bias)
    reach = len(taps) - 1
    count = padded.shape[1] - reach
    out = padded[:, reach:] * taps[reach]
    if bias is not None:
        out += bias
    for j in range(reach):
        out.addcmul_(_masked(padded[:, j : j + count], mask, j), taps[j])
    return out


def _spread(d_sum: Tensor, taps: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of `padded` (B, n+W-1, C) given that of `_sum` (B, n, C)."""
    reach, count = len(taps) - 1, d_sum.shape[1]
    if _fits_onednn(d_sum, mask):
        return _depthwise(F.pad(d_sum, (0, 0, reach, reach)), taps.flip(0), None)
    d_padded = F.pad(d_sum * taps[reach], (0, 0, reach, 0))
    for j in range(reach):
        d_padded[:, j : j + count].addcmul_(_masked(d_sum, mask, j), taps[j])
    return d_padded


def _masked(t: Tensor, mask: Tensor | None, tap: int) -> Tensor:
    """Zero (B, n, C) where the input of a tap is in another segment; the last tap's never is."""
    return t if mask is None or tap == len(mask) else t * mask[tap]


def _fits_onednn(t: Tensor, mask: Tensor | None) -> bool:
    return mask is None and t.is_cpu and t.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _depthwise(padded: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """(B, n+W-1, C) -> (B, n, C), as an image of height 1 whose channels are last in memory."""
    image, kernel = padded.transpose(1, 2)[:, :, None], taps.t()[:, None, None].contiguous()
    return F.conv2d(image, kernel, bias, groups=len(kernel))[:, :, 0].transpose(1, 2)
