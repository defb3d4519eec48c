"""The step sizes dt that both state-space ops discretise with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmvl.errors import ShapeError

LOWEST = -60.0  # exp(-60) = 9e-27 stands for every smaller decay: numbers near 1e-40 are many times slower


def step_sizes(
    dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float], lengths: Tensor | None
) -> Tensor:
    """clamp(softplus(dt + bias), *limit), and 0 beyond each row's length: a step of 0 leaves the state as it is.

    Args:
        dt: (B, L, *), or (B, *) for one position, in the computing dtype.
        bias: (*,), added first.
        softplus: whether to apply it.
        limit: lowest and highest step size.
        lengths: (B,), only with positions.

    Raises:
        ShapeError: the limits are no interval of numbers >= 0.
    """
    low, high = limit
    if not 0 <= low <= high:
        raise ShapeError(f"dt_limit must be (lowest, highest) with 0 <= lowest <= highest, received {limit}")
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    dt = F.softplus(dt) if softplus else dt
    if low > 0 or high < float("inf"):
        dt = dt.clamp(low, high)
    if lengths is not None:
        dt = dt * (torch.arange(dt.shape[1], device=dt.device) < lengths[:, None])[..., None]
    return dt
