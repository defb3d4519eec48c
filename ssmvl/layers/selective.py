"""Selective scan of Mamba-1 over K paths at once: its parameters, and the arguments of its op."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ssmvl.layers.discretization import initial_dt_bias, negative_exp
from ssmvl.layers.linear import is_plain, per_path

__all__ = ["selective_parameters", "selective_arguments"]


def selective_parameters(
    inner: int, count: int, *, d_state: int, dt_rank: int
) -> tuple[nn.Linear, nn.Linear, nn.Parameter, nn.Parameter]:
    """Create x_proj, dt_proj, A_log and D for `count` paths, with the rows of the paths concatenated.

    dt_proj.bias, A_log and D start equal for all paths; x_proj and dt_proj.weight differ.

    Args:
        inner: E.
        count: K, number of parameter sets.
        d_state: S.
        dt_rank: rank of the projection to step sizes.

    Source: arXiv 2312.00752 (Mamba), §3.6; VMamba (arXiv 2401.10166), several paths.
    """
    x_proj = nn.Linear(inner, count * (dt_rank + 2 * d_state), bias=False)
    dt_proj = nn.Linear(dt_rank, count * inner)
    nn.init.uniform_(dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
    with torch.no_grad():
        dt_proj.bias.copy_(initial_dt_bias(inner).repeat(count))
    A_log = nn.Parameter(torch.arange(1, d_state + 1).log().repeat(count * inner, 1))
    return x_proj, dt_proj, A_log, nn.Parameter(torch.ones(count * inner))


def selective_arguments(
    x: Tensor, x_proj: nn.Module, dt_proj: nn.Module, A_log: Tensor, D: Tensor, count: int
) -> dict[str, Any]:
    """X (*, K*E) and the parameters of K = `count` paths -> arguments of `selective_scan` and `selective_scan_step`.

    x and dt are (*, K*E), A is (K*E, S), B and C are (*, K, S): K groups of channels. The op adds the bias of a plain
    `dt_proj`, in fp32; a wrapped `dt_proj` (adapters, quantized weights) adds its bias itself.
    """
    size = A_log.shape[1]
    projected = per_path(x, x_proj, count)
    if is_plain(x_proj) and x_proj.bias is not None:  # ours has no bias
        projected = projected + cast(Tensor, x_proj.bias)
    projected = projected.unflatten(-1, (count, -1))
    dt, B, C = projected.split([projected.shape[-1] - 2 * size, size, size], dim=-1)
    dt = per_path(dt.flatten(-2), dt_proj, count)
    rest = {"D": D, "dt_bias": dt_proj.bias if is_plain(dt_proj) else None, "dt_softplus": True}
    return {"x": x, "dt": dt, "A": negative_exp(A_log), "B": B, "C": C, **rest}
