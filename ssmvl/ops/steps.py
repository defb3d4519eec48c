"""Preparation shared by both state-space ops: checks, casts, and the step sizes dt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmvl.errors import ShapeError
from ssmvl.ops.checks import check_floats, check_groups, check_rows
from ssmvl.ops.precision import without_autocast

# Lower bound of dt A: decays are at least exp(-60) = 9e-27, as arithmetic near 1e-40 (denormals) is many times slower.
LOWEST = -60.0


def step_sizes(
    dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float], lengths: Tensor | None
) -> Tensor:
    """Step sizes clamp(softplus(dt + bias), *limit); 0 beyond each row's length, which leaves the state unchanged.

    Args:
        dt: (B, L, *), or (B, *) for one position, in the computing dtype.
        bias: (*,), added to dt first.
        softplus: whether to apply softplus.
        limit: lowest and highest step size.
        lengths: (B,), only if dt has an axis L; values beyond the lengths must be finite.

    Raises:
        ShapeError: `limit` is not an interval of numbers >= 0, or its lower bound is infinite.
    """
    low, high = limit
    if not 0 <= low <= high or low == float("inf"):
        raise ShapeError(
            f"dt_limit must be (lowest, highest) with lowest < inf and 0 <= lowest <= highest, received {limit}"
        )
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    dt = F.softplus(dt) if softplus else dt
    if low > 0 or high < float("inf"):
        dt = dt.clamp(low, high)
    if lengths is not None:
        dt = dt * (torch.arange(dt.shape[1], device=dt.device) < lengths[:, None])[..., None]
    return dt


def prepare(
    op: str,
    sizes: Mapping[str, int],
    channels: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
    state: Tensor | None,
    lengths: Tensor | None,
    segments: Tensor | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Check all arguments except shapes; return the step sizes, A, D and the state, in the computing dtype.

    Args:
        op: the op's name, for messages.
        sizes: letter of an axis -> its size.
        channels: the letter of the axis that is divided into groups.
        x, dt, A, D, dt_bias, softplus, limit, state, lengths, segments, chunk: the op's arguments.

    Raises:
        ShapeError: x is not floating-point; rows, lengths, segments, groups, limits or chunk are invalid; or segments
            are given together with a state or lengths.
    """
    check_floats(op, x)
    check_rows(op, sizes["B"], sizes["L"], lengths, segments, x.device)
    check_groups(op, sizes[channels], sizes["G"])
    if state is not None and segments is not None:
        raise ShapeError(f"{op}: state and segments are mutually exclusive; packed rows start from a state of zeros")
    if chunk is not None and chunk < 1:
        raise ShapeError(f"{op}: chunk must be at least 1, received {chunk}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        dt = step_sizes(dt.to(dtype), dt_bias, softplus, limit, lengths)
        D, state = (None if t is None else t.to(dtype) for t in (D, state))
        return dt, A.to(dtype), D, state
