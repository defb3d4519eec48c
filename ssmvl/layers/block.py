"""Residual block of language models and connectors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssmvl.interfaces import Mixer, Paths

__all__ = ["Block", "scale_residual"]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(mlp_norm(x)) if there is an MLP. The residual keeps the dtype of x.

    Args:
        mixer: a mixer.
        norm: before the mixer; none if None.
        mlp: position-wise; none if None.
        mlp_norm: before the MLP; none if None.
    """

    def __init__(
        self,
        mixer: nn.Module,
        *,
        norm: nn.Module | None = None,
        mlp: nn.Module | None = None,
        mlp_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm
        self.mixer = mixer
        self.mlp_norm = nn.Identity() if mlp_norm is None else mlp_norm
        self.mlp = mlp

    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        """X (B, L, D) -> (B, L, D); see `Mixer.forward`."""
        return self._mlp(x + self.mixer(self.norm(x), paths, segments))

    def prefill(self, x: Tensor, lengths: Tensor, state: Any) -> Tensor:
        """X (B, L, D) -> (B, L, D); advances `state`; see `Mixer.prefill`."""
        return self._mlp(x + cast(Mixer, self.mixer).prefill(self.norm(x), lengths, state))

    def step(self, x: Tensor, state: Any) -> Tensor:
        """X (B, D) -> (B, D); advances `state`; see `Mixer.step`."""
        return self._mlp(x + cast(Mixer, self.mixer).step(self.norm(x), state))

    def _mlp(self, x: Tensor) -> Tensor:
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))


@torch.no_grad()
def scale_residual(blocks: Iterable[Block], count: int) -> None:
    """Scale each mixer's `out_proj` by 1/sqrt(count), so that the residual stream of `count` mixers keeps its scale."""
    for block in blocks:
        for name, parameter in block.mixer.named_parameters():
            if name == "out_proj.weight":
                parameter.div_(math.sqrt(count))
