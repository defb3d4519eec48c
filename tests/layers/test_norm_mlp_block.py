from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssmvl.layers.block import Block, scale_residual
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.layers.mlp import SwiGLU
from ssmvl.layers.norm import GatedRMSNorm, RMSNorm


def test_rms_norm_in_fp64() -> None:
    norm, x = RMSNorm(6), torch.randn(3, 6)
    nn.init.normal_(norm.weight)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-6, rtol=1e-5)


def test_norm_statistics_are_fp32_in_bf16() -> None:
    norm, x = RMSNorm(4096).bfloat16(), torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), torch.ones_like(x))


def test_gated_norm_gates_before_it_norms() -> None:
    norm, x, gate = GatedRMSNorm(6), torch.randn(3, 6), torch.randn(3, 6)
    torch.testing.assert_close(norm(x, gate), RMSNorm(6)(x * F.silu(gate)))


@pytest.mark.parametrize("tokens", [3, 700])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_groups_are_normalized_separately_forward_and_backward(groups: int, tokens: int) -> None:
    norm, x, gate = GatedRMSNorm(64, groups=groups), torch.randn(tokens, 2, 64), torch.randn(tokens, 64)
    nn.init.normal_(norm.weight)
    values = [t.requires_grad_() for t in (x, gate, norm.weight)]
    parts = [v / (v.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() for v in (x * F.silu(gate)[:, None]).chunk(groups, -1)]
    expected, y = torch.cat(parts, -1) * norm.weight, norm(x, gate)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    weight = torch.randn_like(y)
    for grad, reference in zip(*(torch.autograd.grad((t * weight).sum(), values) for t in (y, expected)), strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-4, rtol=1e-4)


def test_swiglu() -> None:
    mlp, x = SwiGLU(4), torch.randn(2, 4)
    torch.testing.assert_close(mlp(x), mlp.w3(F.silu(mlp.w1(x)) * mlp.w2(x)))


def test_block_adds_the_mixer_then_the_mlp() -> None:
    mixer, mlp, norm = Mamba2Mixer(8, d_state=4, head_dim=4), SwiGLU(8), nn.LayerNorm(8)
    x = torch.randn(1, 5, 8)
    after = x + mixer(x)
    torch.testing.assert_close(Block(mixer)(x), after)
    torch.testing.assert_close(Block(mixer, mlp=mlp, mlp_norm=norm)(x), after + mlp(norm(after)))


def test_block_keeps_the_residual_in_fp32() -> None:
    block = Block(Mamba2Mixer(8, d_state=4, head_dim=4), norm=RMSNorm(8)).bfloat16()
    assert block(torch.randn(1, 5, 8)).dtype == torch.float32


def test_residual_scaling_changes_out_proj_only() -> None:
    block = Block(Mamba2Mixer(8, d_state=4, head_dim=4))
    before = {name: p.clone() for name, p in block.named_parameters()}
    scale_residual([block], 4)
    for name, parameter in block.named_parameters():
        factor = 1 / math.sqrt(4) if name == "mixer.out_proj.weight" else 1
        torch.testing.assert_close(parameter, before[name] * factor)
