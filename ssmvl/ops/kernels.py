"""Adapters for the CUDA kernels of the papers' authors (mamba-ssm and causal-conv1d), imported on first use.

`dt` holds the final step sizes in fp32, so no kernel applies softplus. The table in `ssmvl.ops.backends` lists
unsupported features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmvl.errors import BackendError
from ssmvl.ops.precision import differentiable_once


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
    """The op `ssmvl.ops.ssd.ssd`. The kernel stores the states between chunks in the dtype of C."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C, D, state = differentiable_once(x, dt, A, B, C, D, state)
    y, last = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B.to(x.dtype),
        C.to(x.dtype),
        chunk or 256,
        D=D,
        initial_states=state,
        seq_idx=None if segments is None else segments.int().contiguous(),
        return_final_states=True,
    )
    return y, last.to(dt.dtype)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    segments: None,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """The op `ssmvl.ops.selective_scan.selective_scan`, in fp32: the kernel requires x and dt to have the same dtype.

    The kernel starts from a zero state. The recurrence is linear in its state, so an initial state's contribution is
    computed separately and added.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, A, B, C, D, state = differentiable_once(x, dt, A, B, C, D, state)
    x, B, C = (t.to(dt.dtype) for t in (x, B, C))
    sequences = x.transpose(1, 2), dt.transpose(1, 2), A, B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1)
    y, last = selective_scan_fn(*(t.contiguous() for t in sequences), D, return_last_state=True)
    y = y.transpose(1, 2)
    if state is not None:
        since = dt.cumsum(1)  # (B, L, E)
        for s in range(A.shape[1]):
            decayed = (since * A[:, s]).exp() * state[:, None, :, s]
            y = y + decayed * C[..., s].repeat_interleave(x.shape[2] // C.shape[2], 2)
        last = last + (since[:, -1, :, None] * A).exp() * state
    if last.requires_grad:
        last.register_hook(_reject_gradient)
    return y, last


def _reject_gradient(grad: Tensor | None) -> None:
    if grad is not None:  # None if the state was not used
        raise BackendError("selective_scan: mamba_ssm has no gradient through the final state; use backend='torch'")


def _channels_last(x: Tensor) -> Tensor:
    """(B, L, C) -> (B, C, L) in the kernel's layout: contiguous channels, strides divisible by 8, 16-byte aligned."""
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.transpose(1, 2)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, segments: Tensor | None
) -> Tensor:
    """The op `ssmvl.ops.causal_conv.causal_conv`."""
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias, window = differentiable_once(x, weight, bias, window)
    y = causal_conv1d_fn(
        _channels_last(x),
        weight,
        bias,
        seq_idx=None if segments is None else segments.int().contiguous(),
        initial_states=None if window is None else _channels_last(window.to(x.dtype)),
        activation="silu",
    )
    return y.transpose(1, 2)
