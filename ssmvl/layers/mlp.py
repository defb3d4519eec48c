"""Position-wise MLPs."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SwiGLU"]


class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * (w2 x)), three Linear(D -> D) with bias; (*, D) -> (*, D). Source: ML-Mamba §3.3, released code.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, width)
        self.w2 = nn.Linear(width, width)
        self.w3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """X (*, D) -> (*, D)."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))
