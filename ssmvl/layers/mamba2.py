"""The Mamba-2 mixer over K scan paths, with the state it decodes from."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Count
from ssmvl.layers.norm import GatedRMSNorm
from ssmvl.ops.causal_conv import causal_conv, causal_conv_step
from ssmvl.ops.precision import without_autocast
from ssmvl.ops.reorder import along, inverse
from ssmvl.ops.ssd import ssd, ssd_step


class Mamba2State(NamedTuple):
    """What one mixer remembers: conv (B, W-1, C) in the weights' dtype, ssm (B, H, P, S) in fp32 at least."""

    conv: Tensor
    ssm: Tensor


class Mamba2Mixer(nn.Module):
    """Mamba-2: in_proj -> causal conv -> SSD -> gated RMSNorm over E -> out_proj, along K paths at once.

    `in_proj`, the norm and `out_proj` are shared by the paths; each path has its own conv, dt_bias, A_log and D. The
    paths fold into the head axis (K*H heads, K*G groups): one gather, one SSD, one gather back, however many paths.

    Args:
        width: D.
        num_paths: K; 1 for a causal mixer without paths.
        d_state: S.
        head_dim: P; divides expand * width.
        expand: E / D.
        d_conv: W, taps of the convolution.
        num_groups: G, heads that share B and C; divides the number of heads.
        merge: how the K results, back in raster order, become one before `out_proj`.

    Raises:
        ShapeError: head_dim does not divide E, or num_groups does not divide H.

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
        merge: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        inner = expand * width
        if inner % head_dim:
            raise ShapeError(f"head_dim {head_dim} must divide expand * width = {expand} * {width} = {inner}")
        heads = inner // head_dim
        if heads % num_groups:
            raise ShapeError(f"num_groups {num_groups} must divide the number of heads, {inner} / {head_dim} = {heads}")
        self.num_paths, self.heads, self.head_dim, self.merge = num_paths, heads, head_dim, merge
        self.num_groups, self.d_state, self.inner = num_groups, d_state, inner
        channels = inner + 2 * num_groups * d_state
        self.in_proj = nn.Linear(width, inner + channels + heads, bias=False)
        self.conv1d = nn.Conv1d(num_paths * channels, num_paths * channels, d_conv, groups=num_paths * channels)
        # dt_bias, A_log and D of each path start as copies of the first's.
        dt = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        self.dt_bias = nn.Parameter((dt + torch.log(-torch.expm1(-dt))).repeat(num_paths))  # softplus gives dt back
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log().repeat(num_paths))
        self.D = nn.Parameter(torch.ones(num_paths * heads))
        self.norm = GatedRMSNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, paths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """X (B, L, D), paths (K, L), segments (B, L) -> (B, L, D).

        Raises:
            ShapeError: `paths` is not one for each of the mixer's paths.
        """
        if (1 if paths is None else paths.shape[0]) != self.num_paths:
            got = "none" if paths is None else str(paths.shape[0])
            raise ShapeError(f"a mixer built for num_paths={self.num_paths} received {got} paths")
        z, xBC, dt = self._project(x)
        xBC, dt = (t[:, :, None].expand(-1, -1, self.num_paths, -1) for t in (xBC, dt))
        if paths is not None:
            xBC, dt = along(xBC, paths), along(dt, paths)
        xBC, _ = causal_conv(xBC.flatten(2), self._taps, self.conv1d.bias, segments=segments)
        y, _ = ssd(*self._ssd_inputs(xBC, dt.flatten(2)), D=self.D, segments=segments)
        y = rearrange(y, "b l (k h) p -> b l k (h p)", k=self.num_paths)
        if paths is not None:
            y = along(y, inverse(paths))
        y = self.norm(y, z[:, :, None])
        return self.out_proj(y.mean(2) if self.merge == "mean" else y.sum(2))

    def prefill(self, x: Tensor, lengths: Tensor, state: Mamba2State) -> Tensor:
        """X (B, L, D) right-padded, lengths (B,) -> (B, L, D); causal; advances `state` in place."""
        z, xBC, dt = self._project(x)
        xBC, window = causal_conv(xBC, self._taps, self.conv1d.bias, window=state.conv, lengths=lengths)
        y, ssm = ssd(*self._ssd_inputs(xBC, dt), D=self.D, state=state.ssm, lengths=lengths)
        state.conv.copy_(window)
        state.ssm.copy_(ssm)
        return self.out_proj(self.norm(y.flatten(2), z))

    def step(self, x: Tensor, state: Mamba2State) -> Tensor:
        """X (B, D) -> (B, D); advances `state` in place."""
        z, xBC, dt = self._project(x)
        xBC = causal_conv_step(xBC, self._taps, self.conv1d.bias, state.conv)
        y = ssd_step(*self._ssd_inputs(xBC, dt), self.D, state.ssm)
        return self.out_proj(self.norm(y.flatten(1), z))

    def new_state(
        self, rows: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        """A state of `rows` rows that has seen nothing; device and dtype default to the weights'."""
        device, dtype = device or self.D.device, dtype or self.in_proj.weight.dtype
        reach, channels = self.conv1d.kernel_size[0] - 1, self.conv1d.in_channels
        shape = (rows, self.heads, self.head_dim, self.d_state)
        return Mamba2State(
            torch.zeros(rows, reach, channels, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)),
        )

    @property
    def _taps(self) -> Tensor:
        return self.conv1d.weight.squeeze(1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = self.in_proj(x.to(self.in_proj.weight.dtype))
        channels = self.inner + 2 * self.num_groups * self.d_state
        z, xBC, dt = projected.split([self.inner, channels, self.heads], dim=-1)
        return z, xBC, dt

    def _ssd_inputs(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """XBC (*, K*C) after the conv and dt (*, K*H) -> x (*, K*H, P), dt (*, K*H), A (K*H,), B, C (*, K*G, S)."""
        size = self.num_groups * self.d_state
        folded = F.silu(xBC).unflatten(-1, (self.num_paths, -1))
        x, B, C = folded.split([self.inner, size, size], dim=-1)
        x = rearrange(x, "... k (h p) -> ... (k h) p", p=self.head_dim)
        B, C = (rearrange(t, "... k (g s) -> ... (k g) s", s=self.d_state) for t in (B, C))
        with without_autocast(x.device):  # dt and A in fp32, whatever surrounds them
            dtype = torch.promote_types(dt.dtype, torch.float32)
            return x, F.softplus(dt.to(dtype) + self.dt_bias.to(dtype)), -self.A_log.to(dtype).exp(), B, C
