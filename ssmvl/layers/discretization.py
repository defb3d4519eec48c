"""Initialization and discretization of A and dt, shared by both mixers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssmvl.ops.precision import without_autocast


def negative_exp(log: Tensor) -> Tensor:
    """-exp(log), at least in fp32."""
    with without_autocast(log.device):
        return log.to(torch.promote_types(log.dtype, torch.float32)).exp().neg()


def initial_dt_bias(count: int, lowest: float = 0.001, highest: float = 0.1) -> Tensor:
    """Draw biases (count,) whose softplus is a log-uniform step size in the range. Source: arXiv 2312.00752, §3.6."""
    dt = torch.exp(torch.empty(count).uniform_(math.log(lowest), math.log(highest))).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))
