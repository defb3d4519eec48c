"""Causal convolution of the torch backend: shifted in-place multiply-adds over tiles that stay in the cache."""

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
            F.silu(_sum(padded, taps, bias, mask, y[:, span]), inplace=True)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, taps, bias, window, same)
        return y

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, bias, window, same = ctx.saved_tensors
        dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        d_taps = torch.zeros_like(taps, memory_format=torch.contiguous_format)
        d_bias, d_window = (None if t is None else torch.zeros_like(t) for t in (bias, window))
        for span, padded, mask in _tiles(x, taps, window, same):
            before = _sum(padded, taps, bias, mask, torch.empty_like(dy[:, span]))
            d_sum = torch.ops.aten.silu_backward(dy[:, span], before)
            if d_bias is not None:
                d_bias += d_sum.sum((0, 1))
            count = d_sum.shape[1]
            for j in range(len(taps)):
                grad = d_sum if mask is None or j == len(taps) - 1 else d_sum * mask[j]
                d_taps[j] += torch.mul(grad, padded[:, j : j + count], out=before).sum((0, 1))
                start = span.start + j - len(taps) + 1  # of this tap's inputs in x; below 0 they are in the window
                from_window = max(0, -start)
                if from_window < count:
                    dx[:, start + from_window : start + count].addcmul_(grad[:, from_window:], taps[j])
                if from_window and d_window is not None:
                    d_part = d_window[:, start + len(taps) - 1 :][:, : min(from_window, count)]
                    d_part.addcmul_(grad[:, :from_window], taps[j])
        return dx, d_taps, d_bias, d_window, None


def _tiles(
    x: Tensor, taps: Tensor, window: Tensor | None, same: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield for each tile its slice, the inputs (B, n+W-1, C) of its n outputs, and the mask (W-1, B, n, 1)."""
    (rows, length, channels), reach = x.shape, len(taps) - 1
    first = min(reach, length)
    tile = max(16, 2**18 // (rows * channels)) if x.is_cpu else length  # about 1 MiB
    bounds = [(0, first)] if first else []
    bounds += [(start, min(start + tile, length)) for start in range(first, length, tile)]
    for start, stop in bounds:
        if start < reach:
            before = x.new_zeros(rows, reach, channels) if window is None else window
            padded = torch.cat([before, x[:, :stop]], dim=1)
        else:
            padded = x[:, start - reach : stop]
        yield slice(start, stop), padded, None if same is None else same[:, :, start:stop]


def _sum(padded: Tensor, taps: Tensor, bias: Tensor | None, mask: Tensor | None, out: Tensor) -> Tensor:
    """Bias + sum_j taps[j] * padded[:, j:], written to `out` (B, n, C)."""
    count, reach = out.shape[1], len(taps) - 1
    torch.mul(padded[:, reach:], taps[reach], out=out)
    if bias is not None:
        out += bias
    for j in range(reach):
        past = padded[:, j : j + count]
        out.addcmul_(past if mask is None else past * mask[j], taps[j])
    return out
