"""Mamba-2 mixer over K scan paths, and its decoding state."""

from __future__ import annotations

from math import inf
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Count, Paths
from ssmvl.layers.discretization import initial_dt_bias, negative_exp
from ssmvl.layers.linear import cast_for, conv_taps
from ssmvl.layers.norm import GatedRMSNorm
from ssmvl.layers.paths import PathFolding, PathParameters
from ssmvl.ops.causal_conv import causal_conv, causal_conv_step
from ssmvl.ops.ssd import ssd, ssd_step

__all__ = ["Mamba2Mixer"]


class Mamba2State(NamedTuple):
    """Decoding state of one mixer: conv (B, W-1, C) in the dtype of the weights, ssm (B, H, P, S) at least in fp32."""

    conv: Tensor
    ssm: Tensor


class Mamba2Mixer(nn.Module):
    """Mamba-2: in_proj -> causal conv -> SSD -> gated RMSNorm over E -> out_proj, along K paths at once.

    All paths share `in_proj`, the norm and `out_proj`. Paths with their own parameters (conv, dt_bias, A_log and D) are
    folded into the head axis (K*H heads, K*G groups), paths with shared parameters into the batch. Any number of paths
    takes one gather, one SSD and one gather back.

    Args:
        width: D.
        num_paths: K; 1 for a causal mixer without paths.
        d_state: S.
        head_dim: P; divides expand * width.
        expand: E / D.
        d_conv: W, taps of the convolution.
        num_groups: G, groups of heads that share B and C; divides the number of heads.
        norm_groups: parts of E that are normalized separately; if None, num_groups, as in the original code.
            1 normalizes the whole width, as transformers does up to version 4.57.
        dt_limit: lowest and highest step size.
        dt_init: lowest and highest initial step size. The step size weighs a head's memory against its current input.
        A_init: lowest and highest initial -A. A head forgets within about 1 / (dt * -A) positions.
        path_parameters: whether each path has its `own` parameters, or all paths have `shared` ones.
        merge: how the K results, back in raster order, are combined before `out_proj`.

    Raises:
        ShapeError: head_dim or norm_groups does not divide E, num_groups does not divide H, or a range is invalid.

    Source: arXiv 2405.21060 (Mamba-2); ML-Mamba's released connector (several paths).
    """

    def __init__(
        self,
        width: int,
        num_paths: int = 1,
        *,
        d_state: Count = 128,
        head_dim: Count = 64,
        expand: Count = 2,
        d_conv: Count = 4,
        num_groups: Count = 1,
        norm_groups: Count | None = None,
        dt_limit: tuple[float, float] = (0.0, inf),
        dt_init: tuple[float, float] = (0.001, 0.1),
        A_init: tuple[float, float] = (1.0, 16.0),
        path_parameters: PathParameters = "own",
        merge: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        inner = expand * width
        if inner % head_dim:
            raise ShapeError(f"head_dim {head_dim} must divide expand * width = {expand} * {width} = {inner}")
        heads = inner // head_dim
        if heads % num_groups:
            raise ShapeError(f"num_groups {num_groups} must divide the number of heads, {inner} / {head_dim} = {heads}")
        if not 0 <= dt_limit[0] <= dt_limit[-1]:
            raise ShapeError(f"dt_limit must be (lowest, highest) with 0 <= lowest <= highest, received {dt_limit}")
        for name, (lowest, highest) in (("dt_init", dt_init), ("A_init", A_init)):
            if not 0 < lowest <= highest < inf:
                raise ShapeError(
                    f"{name} must be (lowest, highest) with 0 < lowest <= highest, received {(lowest, highest)}"
                )
        self.folding = PathFolding(num_paths, path_parameters, merge)
        self.heads, self.head_dim, self.num_groups, self.d_state, self.inner = (
            heads,
            head_dim,
            num_groups,
            d_state,
            inner,
        )
        self.dt_limit = dt_limit
        own, channels = self.folding.own, inner + 2 * num_groups * d_state
        self.channels = channels
        self.in_proj = nn.Linear(width, inner + channels + heads, bias=False)
        self.conv1d = nn.Conv1d(own * channels, own * channels, d_conv, groups=own * channels)
        # dt_bias, A_log and D of each path start as copies of those of the first.
        self.dt_bias = nn.Parameter(initial_dt_bias(heads, *dt_init).repeat(own))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*A_init).log().repeat(own))
        self.D = nn.Parameter(torch.ones(own * heads))
        self.norm = GatedRMSNorm(inner, groups=num_groups if norm_groups is None else norm_groups)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        """X (B, L, D), K paths of L, segments (B, L) -> (B, L, D).

        Raises:
            ShapeError: `paths` does not hold K paths of L positions, or is combined with segments.
        """
        self.folding.check(x.shape[1], paths, segments)
        z, xBC, dt = self._project(x)
        xBC, dt = self.folding.fold(xBC, paths), self.folding.fold(dt, paths)
        xBC, _ = causal_conv(xBC, self._taps, self.conv1d.bias, segments=segments)
        y, _ = ssd(*self._ssd_inputs(xBC, dt), **self._ssd_parameters(), segments=segments)
        y = self.norm(self.folding.unfold(y.flatten(2), paths), z)
        return self.out_proj(self.folding.merge(y))

    @torch.no_grad()
    def prefill(self, x: Tensor, lengths: Tensor, state: Mamba2State) -> Tensor:
        """X (B, L, D) right-padded, lengths (B,) -> (B, L, D); causal; advances `state` in place; no gradients."""
        z, xBC, dt = self._project(x)
        xBC, window = causal_conv(xBC, self._taps, self.conv1d.bias, window=state.conv, lengths=lengths)
        inputs = self._ssd_inputs(xBC, dt)
        y, ssm = ssd(*inputs, **self._ssd_parameters(), state=state.ssm, lengths=lengths)
        state.conv.copy_(window)
        state.ssm.copy_(ssm)
        return self._output(y.flatten(2), z)

    @torch.no_grad()
    def step(self, x: Tensor, state: Mamba2State) -> Tensor:
        """X (B, D) -> (B, D); advances `state` in place; no gradients."""
        z, xBC, dt = self._project(x)
        xBC = causal_conv_step(xBC, self._taps, self.conv1d.bias, state.conv)
        y = ssd_step(*self._ssd_inputs(xBC, dt), state.ssm, **self._ssd_parameters())
        return self._output(y.flatten(1), z)

    def new_state(
        self, rows: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        """The initial state of `rows` rows; device and dtype default to those of the weights.

        Raises:
            ShapeError: the mixer has several paths.
        """
        self.folding.check_causal()
        device, dtype = device or self.D.device, dtype or self._taps.dtype
        shape = (rows, self.heads, self.head_dim, self.d_state)
        return Mamba2State(
            torch.zeros(rows, self.conv1d.kernel_size[0] - 1, self.channels, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)),
        )

    @property
    def _taps(self) -> Tensor:
        return conv_taps(self.conv1d)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = self.in_proj(cast_for(x, self.in_proj))
        z, xBC, dt = projected.split([self.inner, self.channels, self.heads], dim=-1)
        return z, xBC, dt

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(self.norm(y, z))

    def _ssd_inputs(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """XBC (*, K*C) after the conv and dt (*, K*H) -> x (*, K*H, P), dt, A (K*H,), B and C (*, K*G, S)."""
        size, own, lead = self.num_groups * self.d_state, self.folding.own, xBC.shape[:-1]
        x, B, C = xBC.view(*lead, own, self.channels).split([self.inner, size, size], dim=-1)
        x = x.reshape(*lead, own * self.heads, self.head_dim)
        B, C = (t.reshape(*lead, own * self.num_groups, self.d_state) for t in (B, C))
        return x, dt, negative_exp(self.A_log), B, C

    def _ssd_parameters(self) -> dict[str, Any]:
        return {"D": self.D, "dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": self.dt_limit}
