"""Mamba-2's state-space duality in plain PyTorch: chunked for sequences, one step for decoding.

Letters: B rows, L positions, Z chunks, Q positions of a chunk, H heads, P head width, G groups, S state size.
The recurrence, head by head (g = the head's group):

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] ⊗ B[t]        h (P, S)
    y[t] = h[t] C[t] + D x[t]

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), §6 and Listing 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmvl.errors import ShapeError
from ssmvl.ops.precision import without_autocast

CHUNK = 64


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The recurrence above over whole sequences, forward and backward.

    Computed in `promote_types(x.dtype, float32)`, autocast or not.

    Args:
        x: (B, L, H, P) inputs.
        dt: (B, L, H) step sizes, >= 0 (softplus already applied).
        A: (H,) negative rates.
        B: (B, L, G, S) input projections; G divides H.
        C: (B, L, G, S) output projections.
        D: (H,) skip weights.
        state: (B, H, P, S), the state before the first position; zeros if None. Not with `segments`.
        lengths: (B,) real positions of right-padded rows; the returned state is the one after them.
        segments: (B, L); state is reset where the segment changes.
        chunk: positions treated as one matrix product; changes speed, not results.

    Returns:
        y (B, L, H, P) in the dtype of `x`, and the state (B, H, P, S) in the computing dtype.

    Raises:
        ShapeError: heads are no multiple of groups, or both a state and segments are given.
    """
    heads, groups = x.shape[2], B.shape[2]
    if heads % groups:
        raise ShapeError(f"{heads} heads cannot share {groups} groups; num_groups must divide the number of heads")
    if state is not None and segments is not None:
        raise ShapeError("a state and segments exclude each other: a packed row starts from nothing")
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        x_, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
        if lengths is not None:
            dt = dt * (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        y, state = _chunked(x_, dt, A, B, C, None if state is None else state.to(dtype), segments, chunk)
        if D is not None:
            y = y + D.to(dtype)[:, None] * x_
    return y.to(x.dtype), state


def _chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, segments: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    rows, length, heads, width = x.shape
    groups, size = B.shape[2:]
    chunk = max(1, min(chunk, length))
    tail = -length % chunk

    def chunks(t: Tensor) -> Tensor:
        """(B, L, …) -> (B, Z, Q, …), the end filled with zeros: dt = 0 leaves the state as it is."""
        t = torch.nn.functional.pad(t, [0, 0] * (t.ndim - 2) + [0, tail])
        return t.unflatten(1, (-1, chunk))

    decay = chunks(dt * A).transpose(2, 3).cumsum(-1)  # (B, Z, H, Q): log decay from the chunk's start, inclusive
    u = chunks(x * dt[..., None]).unflatten(3, (groups, -1))  # (B, Z, Q, G, H/G, P)
    B, C = chunks(B), chunks(C)  # (B, Z, Q, G, S)
    if segments is not None:  # the end belongs to the last segment
        segments = torch.cat([segments, segments[:, -1:].expand(-1, tail)], dim=1)
    pieces = None if segments is None else segments.unflatten(1, (-1, chunk))  # (B, Z, Q)

    # Within a chunk: y[q] += sum_{k <= q} (C[q]·B[k]) exp(decay[q] - decay[k]) u[k]
    keep = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    if pieces is not None:
        keep = keep & (pieces[..., :, None] == pieces[..., None, :])[:, :, None]  # (B, Z, 1, Q, Q)
    log = (decay[..., :, None] - decay[..., None, :]).masked_fill(~keep, -torch.inf)
    scores = torch.einsum("bzqgs,bzkgs->bzgqk", C, B).unsqueeze(3) * log.exp().unflatten(2, (groups, -1))
    y = torch.einsum("bzghqk,bzkghp->bzqghp", scores, u)

    # What each chunk adds to the state by its end: sum_k exp(decay[end] - decay[k]) u[k] ⊗ B[k]
    to_end = (decay[..., -1:] - decay).exp()  # (B, Z, H, Q)
    from_start = decay.exp()
    passes = decay[..., -1].exp()  # (B, Z, H)
    if pieces is not None:
        last = pieces[:, :, -1]  # (B, Z)
        before = torch.nn.functional.pad(last, [1, -1], value=0)
        to_end = to_end * (pieces == last[..., None])[:, :, None]
        from_start = from_start * (pieces == before[..., None])[:, :, None]
        passes = passes * (last == before)[..., None]
    weighted = u * to_end.transpose(2, 3).unflatten(3, (groups, -1))[..., None]
    added = torch.einsum("bzkghp,bzkgs->bzghps", weighted, B).flatten(2, 3)  # (B, Z, H, P, S)

    # Across chunks, one after another
    h = x.new_zeros(rows, heads, width, size) if state is None else state
    entering = []
    # unbind, not indexing: the backward of an index fills a tensor of all chunks with zeros, once for each chunk
    for through, add in zip(passes[..., None, None].unbind(1), added.unbind(1), strict=True):
        entering.append(h)
        h = h * through + add
    if entering:
        stacked = torch.stack(entering, dim=1).unflatten(2, (groups, -1))
        carried = torch.einsum("bzqgs,bzghps->bzqghp", C, stacked)
        y = y + carried * from_start.transpose(2, 3).unflatten(3, (groups, -1))[..., None]
    return y.flatten(3, 4).flatten(1, 2)[:, :length], h


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor) -> Tensor:
    """One position of `ssd`: x (B, H, P), dt (B, H), B and C (B, G, S) -> y (B, H, P); `state` advances in place."""
    dtype = state.dtype
    with without_autocast(x.device):
        x_, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
        repeat = x.shape[1] // B.shape[1]
        B, C = B.repeat_interleave(repeat, dim=1), C.repeat_interleave(repeat, dim=1)
        state.mul_((dt * A).exp()[..., None, None]).add_((x_ * dt[..., None])[..., None] * B[:, :, None])
        y = (state * C[:, :, None]).sum(-1)
        if D is not None:
            y = y + D.to(dtype)[:, None] * x_
    return y.to(x.dtype)
