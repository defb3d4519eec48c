"""The torch backend's selective scan: one position after another, over tiles whose states stay in the cache.

Letters: B rows, L positions, T (at most) positions of a tile, G groups, R channels of a group, E = G*R channels,
S state size. States are held as (…, S, R), channels last, so that every product runs along memory.

Forward keeps the state before each tile; backward computes the states in between again, tile by tile. With
g[t] = dy[t] C[t] + exp(dt[t+1] A) g[t+1], the gradient of h[t], that of dt[t] A is g[t] exp(dt[t] A) h[t-1].
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
    """The op `ssmvl.ops.selective_scan.selective_scan` for L >= 1 and step sizes that are ready, in the dtype of dt."""
    x, B, C = (t.to(dt.dtype) for t in (x, B, C))
    groups = B.shape[2]
    goes_on = None
    if segments is not None:  # (B, L, 1, 1, 1): 0 where a segment starts
        goes_on = (segments == F.pad(segments, [1, -1], value=-2)).to(x.dtype)[..., None, None, None]
    h = (
        None
        if state is None
        else state.unflatten(1, (groups, -1)).transpose(2, 3).clone(memory_format=torch.contiguous_format)
    )
    given = (t.unflatten(2, (groups, 1, -1)) for t in (x, dt))
    rates = A.unflatten(0, (groups, -1)).transpose(1, 2).contiguous()
    y, h = _SelectiveScan.apply(*given, rates, B[..., None], C[..., None], h, goes_on, chunk)
    y = y.flatten(2)
    return y if D is None else torch.addcmul(y, x, D), h.transpose(2, 3).flatten(1, 2)


class _Tile(NamedTuple):
    """Views of T positions."""

    x: Tensor  # (B, T, G, 1, R)
    dt: Tensor  # (B, T, G, 1, R)
    B: Tensor  # (B, T, G, S, 1)
    C: Tensor  # (B, T, G, S, 1)
    goes_on: Tensor | None  # (B, T, 1, 1, 1)

    def run(self, A: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Decays and states (B, T, G, S, R), from the state h (B, G, S, R) before the first position."""
        decays = (self.dt * A).clamp_(min=LOWEST).exp_()
        if self.goes_on is not None:
            decays *= self.goes_on
        states = (self.dt * self.x) * self.B
        if states.is_meta:  # no numbers to carry from position to position
            return decays, states
        for decay, after in zip(decays.unbind(1), states.unbind(1), strict=True):
            if h is not None:
                after.addcmul_(decay, h)
            h = after
        return decays, states


def _cut(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, goes_on: Tensor | None, chunk: int | None) -> list[_Tile]:
    # A tile's states are about two mebibytes; with S positions or more, those kept for backward are no more than x.
    # On meta there is no cache.
    tile = x.shape[1] if x.is_meta else chunk or max(B.shape[3], 2**19 // (x[:, 0].numel() * B.shape[3]))
    cut = [t.split(tile, 1) for t in (x, dt, B, C)]
    masks = [None] * len(cut[0]) if goes_on is None else goes_on.split(tile, 1)
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
        goes_on: Tensor | None,
        chunk: int | None,
    ) -> tuple[Tensor, Any]:
        keep = any(ctx.needs_input_grad)
        entering: list[Any] = []
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tiles = _cut(x, dt, B, C, goes_on, chunk)
        for tile, out in zip(tiles, y.split(tiles[0].x.shape[1], 1), strict=True):
            if keep:
                entering.append(h)
            _, states = tile.run(A, h)
            torch.matmul(tile.C.mT, states, out=out)
            h = states[:, -1].clone()
        ctx.set_materialize_grads(False)
        if keep:
            ctx.chunk = chunk
            ctx.save_for_backward(x, dt, A, B, C, goes_on, *entering)
        return y, h

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, goes_on, *entering = ctx.saved_tensors
        dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dy is None else dy
        dA = torch.zeros_like(A)
        tiles = _cut(x, dt, B, C, goes_on, ctx.chunk)
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
            d_log = g.mul_(decays)  # of dt[t] A, once it has met h[t-1]
            d_log[:, 1:] *= states[:, :-1]
            d_log[:, 0] *= 0 if before is None else before
            dA += (d_log * tile.dt).sum((0, 1))
            torch.sum(d_log.mul_(A), 3, keepdim=True, out=d_dtz)
            d_dtz.addcmul_(du, tile.x)
        dx, d_dt, dB, dC = grads
        return dx, d_dt, dA, dB, dC, None if entering[0] is None else dh, None, None
