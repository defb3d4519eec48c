"""Norms computed at least in fp32."""

from __future__ import annotations

from torch import Tensor, nn

from ssmvl.errors import ShapeError
from ssmvl.ops.rms_norm import rms_norm

__all__ = ["RMSNorm", "GatedRMSNorm"]


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis, computed at least in fp32; (*, D) -> (*, D) in the dtype of the weight.

    Args:
        width: D.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """X (*, D) -> (*, D)."""
        return rms_norm(x, self.weight, self.eps or 0.0)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x * SiLU(gate)).

    Args:
        width: E.
        eps: added to the mean square.
        groups: number of parts of the width that are normalized separately.

    Raises:
        ShapeError: `groups` does not divide the width.

    Source: Mamba-2 (arXiv 2405.21060), the norm before `out_proj`; its groups: §8.
    """

    def __init__(self, width: int, eps: float = 1e-5, groups: int = 1) -> None:
        super().__init__(width, eps)
        if width % groups:
            raise ShapeError(f"norm_groups {groups} must divide the inner width {width}")
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]  # takes a gate, unlike its base
        """X (*, E), or (*, K, E) where K paths share the gate; gate (*, E) -> the shape of x."""
        return rms_norm(x, self.weight, self.eps or 0.0, gate, self.groups)
