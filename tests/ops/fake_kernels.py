"""Stand-ins for mamba-ssm and causal-conv1d: the argument checks of the originals, and a plain loop.

Sources: state-spaces/mamba mamba_ssm/ops/triton/ssd_combined.py, mamba_ssm/ops/selective_scan_interface.py and
csrc/selective_scan/selective_scan.cpp; Dao-AILab/causal-conv1d causal_conv1d_interface.py and csrc/causal_conv1d.cpp.
"""

from __future__ import annotations

import sys
from math import inf
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def loop(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h: Tensor, marks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence, all in fp32: x (B, L, H, P), dt (B, L, H), A (H, S), B and C (B, L, H, S), h (B, H, P, S)."""
    ys = []
    before = None
    for t in range(x.shape[1]):
        if marks is not None:
            first = torch.zeros_like(marks[:, 0]) if before is None else before
            h = h * (marks[:, t] == first)[:, None, None, None]
            before = marks[:, t]
        h = (dt[:, t, :, None] * A).exp()[:, :, None] * h
        h = h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1)
    return (y if D is None else y + D[:, None] * x), h


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, seqlen, nheads, headdim = x.shape
    _, _, ngroups, dstate = B.shape
    assert nheads % ngroups == 0
    assert B.shape == C.shape == (batch, seqlen, ngroups, dstate)
    assert dt.shape == (batch, seqlen, nheads)
    assert A.shape == (nheads,)
    assert D is None or D.shape in ((nheads,), (nheads, headdim))
    assert seq_idx is None or (seq_idx.shape == (batch, seqlen) and seq_idx.dtype == torch.int32)
    assert initial_states is None or initial_states.shape == (batch, nheads, headdim, dstate)
    assert x.dtype == B.dtype == C.dtype
    assert x.dtype in FLOATS
    assert return_final_states
    assert not dt_softplus
    assert not return_varlen_states
    assert z is dt_bias is cu_seqlens is None
    by_head = (t.float().repeat_interleave(nheads // ngroups, 2) for t in (B, C))
    h = x.new_zeros(batch, nheads, headdim, dstate).float() if initial_states is None else initial_states.float()
    out, last = loop(x.float(), dt.float(), A[:, None].expand(-1, dstate), *by_head, D, h, seq_idx)
    return out.to(x.dtype), last


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, dim, seqlen = u.shape
    dstate, groups = A.shape[1], B.shape[1]
    assert u.dtype in FLOATS
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == torch.float32
    assert D is None or (D.dtype == torch.float32 and D.shape == (dim,))
    assert dstate <= 256
    assert delta.shape == u.shape
    assert A.shape == (dim, dstate)
    assert B.shape == C.shape == (batch, groups, dstate, seqlen)
    assert dim % groups == 0
    assert return_last_state
    assert not delta_softplus
    assert z is delta_bias is None
    by_channel = (t.float().permute(0, 3, 1, 2).repeat_interleave(dim // groups, 2) for t in (B, C))
    x, dt = (t.float().transpose(1, 2) for t in (u, delta))
    y, last = loop(x[..., None], dt, A, *by_channel, D, A.new_zeros(batch, dim, 1, dstate), None)
    out = y[..., 0].transpose(1, 2).to(u.dtype)
    # "The gradient of the last state is not considered in the backward pass."
    return out, last[:, :, 0].detach() + 0 * out.sum()


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    if x.stride(2) != 1 and x.stride(1) != 1:
        x = x.contiguous()
    channel_last = x.stride(1) == 1 and x.stride(2) > 1
    assert activation == "silu"
    assert x.dtype in FLOATS
    assert weight.dtype in FLOATS
    assert weight.shape == (dim, width)
    assert 2 <= width <= 4
    assert bias is None or (bias.dtype == weight.dtype and bias.shape == (dim,))
    if channel_last:
        assert dim % 8 == 0, "channel dimension divisible by 8"
        assert x.stride(2) % 8 == 0 == x.stride(0) % 8, "strides (x.stride(0) and x.stride(2)) to be multiples of 8"
    if seq_idx is not None:
        assert initial_states is None, "initial_states must be None if seq_idx is not None"
        assert channel_last, "seq_idx is only supported for channel last layout"
        assert seq_idx.dtype == torch.int32
        assert seq_idx.is_contiguous()
        assert seq_idx.shape == (batch, seqlen)
    if initial_states is not None:
        if initial_states.stride(2) != 1 and initial_states.stride(1) != 1:
            initial_states = initial_states.contiguous()
        assert channel_last, "initial_states is only supported for channel last layout"
        assert initial_states.dtype == x.dtype
        assert initial_states.shape == (batch, dim, width - 1)
        assert initial_states.stride(1) == 1
    assert not return_final_states
    assert final_states_out is None
    before = x.new_zeros(batch, dim, width - 1) if initial_states is None else initial_states
    padded = torch.cat([before, x], 2).float()
    marks = torch.zeros(batch, seqlen) if seq_idx is None else seq_idx
    marks = torch.cat([marks[:, :1].expand(-1, width - 1), marks], 1)
    y = 0 if bias is None else bias.float()[:, None]
    for tap in range(width):
        same = marks[:, tap : tap + seqlen] == marks[:, width - 1 :]
        y = y + weight[:, tap, None].float() * padded[..., tap : tap + seqlen] * same[:, None]
    return F.silu(y).to(x.dtype)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stand-ins under the names of the real packages."""
    contents = {
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
        "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
