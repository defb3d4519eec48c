"""Mamba-1 mixer over K scan paths, and its decoding state."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmvl.interfaces import Count, Paths
from ssmvl.layers.linear import cast_for, conv_taps
from ssmvl.layers.paths import PathFolding, PathParameters
from ssmvl.layers.selective import selective_arguments, selective_parameters
from ssmvl.ops.causal_conv import causal_conv, causal_conv_step
from ssmvl.ops.selective_scan import selective_scan, selective_scan_step

__all__ = ["Mamba1Mixer"]


class Mamba1State(NamedTuple):
    """Decoding state of one mixer: conv (B, W-1, E) in the dtype of the weights, ssm (B, E, S) at least in fp32."""

    conv: Tensor
    ssm: Tensor


class Mamba1Mixer(nn.Module):
    """Mamba-1: in_proj -> causal conv -> selective scan -> gate SiLU(z) -> out_proj, along K paths at once.

    All paths share `in_proj` and `out_proj`. Paths with their own parameters (conv, x_proj, dt_proj, A_log and D) are
    folded into the channels (K*E channels, K groups), paths with shared parameters into the batch. Any number of paths
    takes one gather, one scan and one gather back.

    Args:
        width: D.
        num_paths: K; 1 for a causal mixer without paths.
        d_state: S.
        expand: E / D.
        d_conv: W, taps of the convolution.
        dt_rank: rank of the projection to step sizes; ceil(D / 16) if None.
        path_parameters: whether each path has its `own` parameters, or all paths have `shared` ones.
        merge: how the K results, back in raster order, are combined before the gate.

    Source: arXiv 2312.00752 (Mamba); VMamba (arXiv 2401.10166), several paths.
    """

    def __init__(
        self,
        width: int,
        num_paths: int = 1,
        *,
        d_state: Count = 16,
        expand: Count = 2,
        d_conv: Count = 4,
        dt_rank: Count | None = None,
        path_parameters: PathParameters = "own",
        merge: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        inner, dt_rank = expand * width, dt_rank or -(-width // 16)
        self.folding = PathFolding(num_paths, path_parameters, merge)
        self.inner, self.d_state, self.dt_rank = inner, d_state, dt_rank
        own = self.folding.own
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(own * inner, own * inner, d_conv, groups=own * inner)
        parameters = selective_parameters(inner, own, d_state=d_state, dt_rank=dt_rank)
        self.x_proj, self.dt_proj, self.A_log, self.D = parameters
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        """X (B, L, D), K paths of L, segments (B, L) -> (B, L, D).

        Raises:
            ShapeError: `paths` does not hold K paths of L positions, or is combined with segments.
        """
        self.folding.check(x.shape[1], paths, segments)
        x, z = self._project(x)
        x, _ = causal_conv(self.folding.fold(x, paths), self._taps, self.conv1d.bias, segments=segments)
        y, _ = selective_scan(**self._arguments(x), segments=segments)
        y = self.folding.merge(self.folding.unfold(y, paths))
        return self.out_proj(y * F.silu(z))

    @torch.no_grad()
    def prefill(self, x: Tensor, lengths: Tensor, state: Mamba1State) -> Tensor:
        """X (B, L, D) right-padded, lengths (B,) -> (B, L, D); causal; advances `state` in place; no gradients."""
        x, z = self._project(x)
        x, window = causal_conv(x, self._taps, self.conv1d.bias, window=state.conv, lengths=lengths)
        y, ssm = selective_scan(**self._arguments(x), state=state.ssm, lengths=lengths)
        state.conv.copy_(window)
        state.ssm.copy_(ssm)
        return self.out_proj(y * F.silu(z))

    @torch.no_grad()
    def step(self, x: Tensor, state: Mamba1State) -> Tensor:
        """X (B, D) -> (B, D); advances `state` in place; no gradients."""
        x, z = self._project(x)
        x = causal_conv_step(x, self._taps, self.conv1d.bias, state.conv)
        y = selective_scan_step(**self._arguments(x), state=state.ssm)
        return self.out_proj(y * F.silu(z))

    def new_state(
        self, rows: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba1State:
        """The initial state of `rows` rows; device and dtype default to those of the weights.

        Raises:
            ShapeError: the mixer has several paths.
        """
        self.folding.check_causal()
        device, dtype = device or self.D.device, dtype or self._taps.dtype
        return Mamba1State(
            torch.zeros(rows, self.conv1d.kernel_size[0] - 1, self.inner, device=device, dtype=dtype),
            torch.zeros(rows, self.inner, self.d_state, device=device, dtype=torch.promote_types(dtype, torch.float32)),
        )

    @property
    def _taps(self) -> Tensor:
        return conv_taps(self.conv1d)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, z = self.in_proj(cast_for(x, self.in_proj)).chunk(2, dim=-1)
        return x, z

    def _arguments(self, x: Tensor) -> dict[str, Any]:
        return selective_arguments(x, self.x_proj, self.dt_proj, self.A_log, self.D, self.folding.own)
