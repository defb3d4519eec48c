"""Norms with fp32 statistics."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis, computed in fp32; (*, D) -> (*, D) in the weight's dtype.

    Args:
        width: D.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """X (*, D) -> (*, D)."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(self.weight.dtype)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x * SiLU(gate)). Source: Mamba-2 (arXiv 2405.21060), the norm before `out_proj`."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]  # a gate more than its base
        """X (*, E), gate (*, E) -> (*, E)."""
        return super().forward(x.float() * F.silu(gate.float()))
