"""SSD of the torch backend: matrix products within chunks of a sequence, a state from chunk to chunk.

Letters: B rows, L positions, Z chunks, Q positions per chunk (at most), G groups, R heads per group, H = G*R heads,
P head width, S state size. With a[t] = dt[t] A, u[t] = dt[t] x[t] and s[t] the sum of a from the chunk's start to t:

    y[q] = sum_{k <= q} (C[q]·B[k]) exp(s[q] - s[k]) u[k] + exp(s[q]) h C[q] + D x[q]
    h'   = exp(s[Q]) h + sum_k exp(s[Q] - s[k]) u[k] ⊗ B[k]

Forward saves the state before each chunk; backward recomputes everything else, chunk by chunk. No tensor is larger than
the inputs, and the data of a chunk stay in the cache. The gradient of a[t] sums everything that flows from a position
before t to a position at or after t. It is computed as this sum: dy·y - du·u, summed from t on, is the same number, but
where decays are strong it is a difference of large numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmvl.ops.precision import backward_without_autocast
from ssmvl.ops.steps import LOWEST

LONGEST_CHUNK = 128  # beyond it, fp32 differences of log decays are not accurate to 1e-4 at a log decay of 20 per step


def ssd(
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
    """The op `ssmvl.ops.ssd.ssd` for L >= 1 and final step sizes, in the dtype of `dt`."""
    x, B, C = (t.to(dt.dtype) for t in (x, B, C))
    if D is not None and not torch.is_grad_enabled():
        D = D.detach()  # otherwise D alone would make forward save every state
    small = x[0, 0].numel() * B.shape[3] <= 2**16  # then the calls cost more than the products
    chunk = chunk or (64 if x.is_cpu and not small else LONGEST_CHUNK)
    return _SSD.apply(x, dt, dt * A, B, C, D, state, segments, min(chunk, LONGEST_CHUNK, x.shape[1]))


class _Chunk(NamedTuple):
    """Inputs of one chunk of q positions, and buffers for its results.

    Buffers by head, (B, G, R, q, P), are for one product per head; those by group, (B, G, q, R, P), for one per group.
    """

    x: Tensor  # (B, q, G, R, P)
    dt: Tensor  # (B, q, G, R, 1)
    B: Tensor  # (B*G, q, S)
    C: Tensor  # (B*G, q, S)
    sums: Tensor  # (B, G, R, q): s - s[Q] / 2, centered for fp32
    since_start: Tensor  # (B, q, G, R, 1): exp(s); 0 in segments that start in this chunk
    to_end: Tensor  # (B, q, G, R, 1): exp(s[Q] - s); 0 in segments that end before the chunk's last position
    through: Tensor  # (B, H, 1, 1): exp(s[Q]); 0 if a segment starts in this chunk
    same: Tensor  # (B or 1, 1, q, q): 1 where k <= q and both are in the same segment
    u: Tensor  # by head
    by_head: Tensor
    by_group: Tensor
    square: Tensor  # (B, G, R, q, q)

    def scores(self) -> tuple[Tensor, Tensor]:
        """C[q]·B[k] (B, G, 1, q, q), 0 where `same` is 0, and exp(s[q] - s[k]) in `square`; also fills `u`."""
        torch.mul(self.x, self.dt, out=self.u.movedim(3, 1))
        products = torch.bmm(self.C, self.B.transpose(1, 2)).unflatten(0, self.u.shape[:2]).mul_(self.same)
        torch.sub(self.sums[..., None], self.sums[..., None, :], out=self.square)
        return products[:, :, None], self.square.clamp_(LOWEST, 0).exp_()

    def group_matrix(self) -> Tensor:
        """`by_group` as (B*G, q, R*P)."""
        rows, groups, q = self.by_group.shape[:3]
        return self.by_group.view(rows * groups, q, -1)


def _cut(x: Tensor, dt: Tensor, log: Tensor, B: Tensor, C: Tensor, segments: Tensor | None, chunk: int) -> list[_Chunk]:
    rows, length, groups, size = B.shape
    tail = -length % chunk
    # In fp64 and centered: fp32 differences of two sums are then accurate to 6e-5 at a log decay of 20 per step.
    steps = F.pad(log.clamp(min=LOWEST).double(), [0, 0, 0, tail]).unflatten(1, (-1, chunk))
    sums = steps.cumsum(2)  # (B, Z, Q, H)
    total = sums[:, :, -1:]
    centered = (sums - total / 2).to(log.dtype).transpose(2, 3).contiguous()
    since, to_end, through = (t.clamp(min=LOWEST).exp().to(log.dtype) for t in (sums, total - sums, total[:, :, 0]))
    same = x.new_ones(chunk, chunk).tril().expand(1, steps.shape[1], 1, chunk, chunk)
    if segments is not None:  # the padding of the last chunk belongs to the last segment
        ids = torch.cat([segments, segments[:, -1:].expand(-1, tail)], dim=1).unflatten(1, (-1, chunk))
        last = ids[:, :, -1:]
        before = F.pad(last, [0, 0, 1, -1])
        since = since * (ids == before)[..., None]
        to_end = to_end * (ids == last)[..., None]
        through = through * (last == before)
        same = same * (ids[..., :, None] == ids[..., None, :])[:, :, None]
    since, to_end = (t.unflatten(3, (groups, -1))[..., None] for t in (since, to_end))
    decays = centered.unflatten(2, (groups, -1)), since, to_end, through[..., None, None], same
    views: Iterable[tuple[Tensor, ...]] = zip(
        *(_pieces(t, groups, chunk) for t in (x, dt[..., None])),
        *(t.transpose(1, 2).reshape(-1, length, size).split(chunk, 1) for t in (B, C)),
        *(t.unbind(1) for t in decays),
        strict=True,
    )
    chunks: list[_Chunk] = []
    for *inputs, centered, since, to_end, through, same in views:
        _, q, _, per_group, width = inputs[0].shape
        if not chunks or q < chunk:
            shapes = (per_group, q, width), (per_group, q, width), (q, per_group, width), (per_group, q, q)
            buffers = [x.new_empty(rows, groups, *shape) for shape in shapes]
        cropped = [centered[..., :q], since[:, :q], to_end[:, :q], through, same[..., :q, :q]]
        chunks.append(_Chunk._make([*inputs, *cropped, *buffers]))
    return chunks


def _pieces(t: Tensor, groups: int, chunk: int) -> tuple[Tensor, ...]:
    """(B, L, H, *) -> a view (B, q, G, R, *) of each chunk."""
    return t.unflatten(2, (groups, -1)).split(chunk, 1)


def _matrix(h: Tensor, groups: int) -> Tensor:
    """A view (B*G, R*P, S) of a state (B, H, P, S)."""
    return h.view(h.shape[0] * groups, -1, h.shape[-1])


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        log: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        state: Tensor | None,
        segments: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        groups, keep = B.shape[2], any(ctx.needs_input_grad)
        skip = None if D is None else D.view(groups, -1, 1)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        entering = []
        h: Any = None if state is None else state.clone(memory_format=torch.contiguous_format)
        for part, yz in zip(_cut(x, dt, log, B, C, segments, chunk), _pieces(y, groups, chunk), strict=True):
            entering.append(h)
            products, decays = part.scores()
            torch.bmm(decays.mul_(products).flatten(0, 2), part.u.flatten(0, 2), out=part.by_head.flatten(0, 2))
            from_inputs, by_group = part.by_head.movedim(3, 1), part.by_group.movedim(2, 1)
            if h is None:
                yz.copy_(from_inputs)
            else:
                torch.bmm(part.C, _matrix(h, groups).transpose(1, 2), out=part.group_matrix())
                torch.addcmul(from_inputs, by_group, part.since_start, out=yz)
            if skip is not None:
                yz.addcmul_(part.x, skip)
            torch.mul(part.u.movedim(3, 1), part.to_end, out=by_group)
            if h is None:
                h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
            else:
                h = h * part.through if keep else h.mul_(part.through)
            _matrix(h, groups).baddbmm_(part.group_matrix().transpose(1, 2), part.B)
        ctx.set_materialize_grads(False)
        if keep:
            ctx.chunk = chunk
            ctx.save_for_backward(x, dt, log, B, C, D, segments, state, *entering)
        return y, h

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, log, B, C, D, segments, _, *entering = ctx.saved_tensors
        groups, chunk = B.shape[2], ctx.chunk
        dy = torch.zeros_like(x) if dy is None else dy
        dh = None if dh is None else dh.contiguous()
        skip = None if D is None else D.view(groups, -1, 1)
        dx, d_dt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        # Gradient that passes each step's log decay: within its chunk, from before it, out of it, through all of it.
        within, entered, left = (torch.zeros_like(d_dt) for _ in range(3))
        through = x.new_zeros(len(entering), x.shape[0], x.shape[2])
        d_skip = torch.zeros_like(skip) if skip is not None else None
        sequences = (t if t.ndim == 4 else t[..., None] for t in (dy, dx, d_dt, within, entered, left))
        by_head = zip(*(_pieces(t, groups, chunk) for t in sequences), strict=True)
        by_group = zip(*(t.split(chunk, 1) for t in (dB, dC)), strict=True)
        chunks = _cut(x, dt, log, B, C, segments, chunk)
        later, earlier = x.new_ones(chunk, chunk).triu(), x.new_ones(chunk, chunk).tril(-1)
        views = [*zip(chunks, by_head, by_group, entering, through, strict=True)]
        for part, (dyz, dxz, d_dtz, within_z, entered_z, left_z), outputs, before, through_z in reversed(views):
            du, dB_flat, dC_flat = _within(part, dyz, within_z, later, earlier)
            dh = _across(part, dyz, before, dh, du, dB_flat, dC_flat, entered_z, left_z, through_z)
            for output, flat in zip(outputs, (dB_flat, dC_flat), strict=True):
                output.copy_(flat.unflatten(0, (-1, groups)).transpose(1, 2))
            products = part.by_group.movedim(2, 1)
            torch.sum(torch.mul(du, part.x, out=products), -1, keepdim=True, out=d_dtz)
            torch.mul(du, part.dt, out=dxz)
            if d_skip is not None:
                d_skip += torch.mul(dyz, part.x, out=products).sum((0, 1)).sum(-1, keepdim=True)
                dxz.addcmul_(dyz, skip)
        tail = -x.shape[1] % chunk
        entered, left = (F.pad(t.double(), [0, 0, 0, tail]).unflatten(1, (-1, chunk)) for t in (entered, left))
        passed = entered.flip(2).cumsum(2).flip(2) + (left.cumsum(2) - left) + through.transpose(0, 1)[:, :, None]
        d_log = within + passed.flatten(1, 2)[:, : x.shape[1]]
        dD = None if d_skip is None else d_skip.view_as(D)
        return dx, d_dt, d_log.to(x.dtype), dB, dC, dD, None if entering[0] is None else dh, None, None


def _within(part: _Chunk, dy: Tensor, passed: Tensor, later: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward through the sum over the chunk's own inputs: gradients of u (B, q, G, R, P), and of B and C (B*G, q, S).

    Writes the gradient that passes each step t, over all k < t <= q, to `passed` (B, q, G, R, 1). `later` is 1 where
    column >= row, `earlier` is 1 where column < row.
    """
    products, decays = part.scores()
    weights = (decays * products).flatten(0, 2)
    part.by_head.movedim(3, 1).copy_(dy)
    dy_heads, u_heads = part.by_head.flatten(0, 2), part.u.flatten(0, 2)
    du = torch.bmm(weights.transpose(1, 2), dy_heads).view_as(part.u).movedim(3, 1)
    d_products = torch.bmm(dy_heads, u_heads.transpose(1, 2), out=weights).view_as(decays).mul_(decays)
    flat = d_products.sum(2).mul_(part.same).flatten(0, 1)
    dB, dC = torch.bmm(flat.transpose(1, 2), part.C), torch.bmm(flat, part.B)
    from_k_to_q, q = d_products.mul_(products).flatten(0, 2), dy.shape[1]
    from_k = torch.bmm(later[:q, :q].expand_as(from_k_to_q), from_k_to_q, out=decays.view_as(from_k_to_q))
    passed.copy_(from_k.mul_(earlier[:q, :q]).sum(-1).view(part.sums.shape).movedim(3, 1)[..., None])
    return du, dB, dC


def _across(
    part: _Chunk,
    dy: Tensor,
    before: Tensor | None,
    dh: Tensor | None,
    du: Tensor,
    dB: Tensor,
    dC: Tensor,
    entered: Tensor,
    left: Tensor,
    through: Tensor,
) -> Tensor | None:
    """Backward through the states: dh of the state after the chunk -> dh of the state before it; adds to du, dB and dC.

    Writes what flows from the state before into each position to `entered`, from each position into the state after to
    `left` (both (B, q, G, R, 1)), and through the whole chunk to `through` (B, H).
    """
    groups, by_group, matrix = part.u.shape[1], part.by_group.movedim(2, 1), part.group_matrix()
    if dh is not None:
        torch.mul(part.u.movedim(3, 1), part.to_end, out=by_group)
        dB.baddbmm_(matrix, _matrix(dh, groups))
        torch.bmm(part.B, _matrix(dh, groups).transpose(1, 2), out=matrix)
        by_group *= part.to_end
        du += by_group
        torch.sum(by_group.mul_(part.u.movedim(3, 1)), -1, keepdim=True, out=left)
        dh = dh * part.through
    if before is not None:
        if dh is None:
            dh = torch.zeros_like(before)
        else:
            torch.sum(dh * before, (2, 3), out=through)
        torch.bmm(part.C, _matrix(before, groups).transpose(1, 2), out=matrix)
        by_group *= part.since_start
        torch.sum(by_group.mul_(dy), -1, keepdim=True, out=entered)
        torch.mul(dy, part.since_start, out=by_group)
        dC.baddbmm_(matrix, _matrix(before, groups))
        _matrix(dh, groups).baddbmm_(matrix.transpose(1, 2), part.C)
    return dh
