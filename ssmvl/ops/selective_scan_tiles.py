"""Selective scan of the torch backend: position by position, over tiles whose states stay in the cache.

Letters: B rows, L positions, T positions per tile (at most), G groups, R channels per group, E = G*R channels, S state
size. States are stored as (…, S, R), channels last, so that every product runs over contiguous memory.

Forward saves the state before each tile; backward recomputes the states within, tile by tile. The gradient of h[t] is
g[t] = dy[t] C[t] + exp(dt[t+1] A) g[t+1]; that of dt[t] A is g[t] exp(dt[t] A) h[t-1].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmvl.ops.precision import backward_without_autocast
from ssmvl.ops.steps import LOWEST


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """The op `ssmvl.ops.selective_scan.selective_scan` for L >= 1 and final step sizes, in the dtype of `dt`."""
    x, B, C = (t.to(dt.dtype) for t in (x, B, C))
    groups = B.shape[2]
    continues = None
    if segments is not None:  # (B, L, 1, 1, 1): 0 where a segment starts
        continues = (segments == F.pad(segments, [1, -1], value=-2)).to(x.dtype)[..., None, None, None]
    h = (
        None
        if state is None
        else state.unflatten(1, (groups, -1)).transpose(2, 3).clone(memory_format=torch.contiguous_format)
    )
    x_and_dt = (t.unflatten(2, (groups, 1, -1)) for t in (x, dt))
    rates = A.unflatten(0, (groups, -1)).transpose(1, 2).contiguous()
    y, h = _SelectiveScan.apply(*x_and_dt, rates, B[..., None], C[..., None], h, continues, chunk)
    y = y.flatten(2)
    return y if D is None else torch.addcmul(y, x, D), h.transpose(2, 3).flatten(1, 2)


class _Tile(NamedTuple):
    """Views of T positions."""

    x: Tensor  # (B, T, G, 1, R)
    dt: Tensor  # (B, T, G, 1, R)
    B: Tensor  # (B, T, G, S, 1)
    C: Tensor  # (B, T, G, S, 1)
    continues: Tensor | None  # (B, T, 1, 1, 1)

    def run(self, A: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Decays and states (B, T, G, S, R), from the state h (B, G, S, R) before the first position."""
        decays = (self.dt * A).clamp_(min=LOWEST).exp_()
        if self.continues is not None:
            decays *= self.continues
        states = (self.dt * self.x) * self.B
        if states.is_meta:  # no values to carry from position to position
            return decays, states
        for decay, after in zip(decays.unbind(1), states.unbind(1), strict=True):
            if h is not None:
                after.addcmul_(decay, h)
            h = after
        return decays, states


def _cut(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, continues: Tensor | None, chunk: int | None) -> list[_Tile]:
    # A tile's states take about 2 MiB. With S positions or more per tile, the states saved for backward take no more
    # memory than x. On meta there is no cache, so one tile is enough.
    tile = x.shape[1] if x.is_meta else chunk or max(B.shape[3], 2**19 // (x[:, 0].numel() * B.shape[3]))
    cut = [t.split(tile, 1) for t in (x, dt, B, C)]
    masks = [None] * len(cut[0]) if continues is None else continues.split(tile, 1)
    return [_Tile(*views) for views in zip(*cut, masks, strict=True)]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        h: Tensor | None,
        continues: Tensor | None,
        chunk: int | None,
    ) -> tuple[Tensor, Any]:
        keep = any(ctx.needs_input_grad)
        entering: list[Any] = []
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tiles = _cut(x, dt, B, C, continues, chunk)
        for tile, out in zip(tiles, y.split(tiles[0].x.shape[1], 1), strict=True):
            if keep:
                entering.append(h)
            _, states = tile.run(A, h)
            torch.matmul(tile.C.mT, states, out=out)
            h = states[:, -1].clone()
        ctx.set_materialize_grads(False)
        if keep:
            ctx.chunk = chunk
            ctx.save_for_backward(x, dt, A, B, C, continues, *entering)
        return y, h

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, continues, *entering = ctx.saved_tensors
        dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dy is None else dy
        dA = torch.zeros_like(A)
        tiles = _cut(x, dt, B, C, continues, ctx.chunk)
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C)]
        views = zip(tiles, *(t.split(tiles[0].x.shape[1], 1) for t in (dy, *grads)), entering, strict=True)
        for tile, dyz, dxz, d_dtz, dBz, dCz, before in reversed([*views]):
            decays, states = tile.run(A, before)
            g = dyz * tile.C
            for now, decay in zip(reversed(g.unbind(1)), reversed(decays.unbind(1)), strict=True):
                if dh is not None:
                    now += dh
                dh = decay * now
            torch.matmul(states, dyz.mT, out=dCz)
            torch.matmul(g, (tile.dt * tile.x).mT, out=dBz)
            du = torch.matmul(tile.B.mT, g)
            torch.mul(du, tile.dt, out=dxz)
            d_log = g.mul_(decays)  # gradient of dt[t] A, once multiplied by h[t-1]
            d_log[:, 1:] *= states[:, :-1]
            d_log[:, 0] *= 0 if before is None else before
            dA += (d_log * tile.dt).sum((0, 1))
            torch.sum(d_log.mul_(A), 3, keepdim=True, out=d_dtz)
            d_dtz.addcmul_(du, tile.x)
        dx, d_dt, dB, dC = grads
        return dx, d_dt, dA, dB, dC, None if entering[0] is None else dh, None, None
