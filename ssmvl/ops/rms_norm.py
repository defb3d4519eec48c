"""RMSNorm with an optional gate and groups; only the inputs are saved for backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmvl.ops.precision import backward_without_autocast, without_autocast

__all__ = ["rms_norm"]

TILE = 2**18  # elements of a tile, so that its intermediate values stay in the cache
SMALL = 2**15  # elements up to which one call of torch's own rms_norm is faster than tiles, as in decoding


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, groups: int = 1) -> Tensor:
    """V / sqrt(mean(v²) + eps) * weight with v = x SiLU(gate), the mean over each of `groups` parts of the last axis.

    Computes in `promote_types(x.dtype, float32)`, with or without autocast.

    Args:
        x: (*, E), or (*, K, E) where K paths share a gate.
        weight: (E,).
        eps: added to the mean square.
        gate: (*, E); no gate if None.
        groups: number of parts; divides E.

    Returns:
        A tensor of the shape of `x`, in the dtype of `weight`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        inputs = x.to(dtype), weight.to(dtype), None if gate is None else gate.to(dtype)
        y = (_small if x.numel() <= SMALL else _tiled)(*inputs, eps, groups)
    return y.to(weight.dtype)


def _small(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, groups: int) -> Tensor:
    if gate is not None:
        activated = F.silu(gate)
        x = x * (activated.unsqueeze(-2) if x.ndim > gate.ndim else activated)
    if groups == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    parts = x.unflatten(-1, (groups, -1))
    return F.rms_norm(parts, parts.shape[-1:], eps=eps).flatten(-2) * weight


def _tiled(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, groups: int) -> Tensor:
    paths = x.shape[-2] if gate is not None and x.ndim > gate.ndim else 1
    parts = x.reshape(-1, paths, groups, x.shape[-1] // groups)
    if gate is not None:
        gate = gate.reshape(-1, 1, groups, parts.shape[-1])
    return _RMSNorm.apply(parts, weight.view(groups, -1), eps, gate).view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part, v, _, scale in _tiles(x, eps, gate):
            torch.mul(v, scale, out=y[part]).mul_(weight)
        if any(ctx.needs_input_grad):
            ctx.eps = eps
            ctx.save_for_backward(x, weight, gate)
        return y

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_weight = torch.zeros_like(weight)
        d_gate = None if gate is None else torch.empty(gate.shape, dtype=x.dtype, device=x.device)
        for part, v, activated, scale in _tiles(x, ctx.eps, gate):
            normed = v * scale
            d_weight += (dy[part] * normed).sum((0, 1))
            dv = dy[part] * weight
            mean = (dv * normed).mean(-1, keepdim=True)
            dv.addcmul_(normed, mean, value=-1).mul_(scale)
            torch.mul(dv, activated, out=dx[part])
            if d_gate is not None:
                d_activated = dv.mul_(x[part]).sum(1, keepdim=True)
                torch.ops.aten.silu_backward.grad_input(d_activated, gate[part], grad_input=d_gate[part])
        return dx, d_weight, None, d_gate


def _tiles(x: Tensor, eps: float, gate: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield for each tile its slice, v, SiLU(gate) (1 without a gate), and 1 / sqrt(mean(v²) + eps)."""
    tile = max(1, TILE // max(1, x[:1].numel())) if x.is_cpu else len(x)
    for start in range(0, len(x), tile or 1):
        part = slice(start, start + tile)
        activated = x.new_ones(()) if gate is None else F.silu(gate[part])
        v = x[part] if gate is None else x[part] * activated
        mean = torch.linalg.vector_norm(v, dim=-1, keepdim=True).square_().div_(v.shape[-1])
        yield part, v, activated, mean.add_(eps).rsqrt_()
