"""Norms computed in fp32 at least."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis, computed in fp32 at least; (*, D) -> (*, D) in the weight's dtype.

    Args:
        width: D.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """X (*, D) -> (*, D)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x * SiLU(gate)). Source: Mamba-2 (arXiv 2405.21060), the norm before `out_proj`."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]  # a gate more than its base
        """X (*, E), gate (*, E) -> (*, E)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return super().forward(x.to(dtype) * F.silu(gate.to(dtype)))
