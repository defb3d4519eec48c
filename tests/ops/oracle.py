"""Reference implementations of the ops over sequences, position by position in fp64; they use no code of the ops."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Values = dict[str, Any]

SEQUENCES = ("x", "dt", "B", "C")  # the arguments with one entry per position
HEADS = ((2, 1), (4, 2), (3, 3))  # heads and groups


def inputs(
    op: str,
    rows: int,
    length: int,
    heads: int = 4,
    groups: int = 2,
    *,
    width: int = 3,
    size: int = 5,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Values:
    """Every tensor argument except dt_bias. Step sizes are below `scale`, rates A in -1.1…-0.1."""
    per_head = (width,) if op == "ssd" else ()
    return {
        "x": torch.randn(rows, length, heads, *per_head, dtype=dtype),
        "dt": torch.rand(rows, length, heads, dtype=dtype) * scale,
        "A": -torch.rand(*((heads,) if op == "ssd" else (heads, size)), dtype=dtype) - 0.1,
        "B": torch.randn(rows, length, groups, size, dtype=dtype),
        "C": torch.randn(rows, length, groups, size, dtype=dtype),
        "D": torch.randn(heads, dtype=dtype),
        "state": torch.randn(rows, heads, *per_head, size, dtype=dtype),
    }


@st.composite
def calls(draw: st.DrawFn, op: str, max_length: int = 40) -> Values:
    """Arguments with dt |A| at most 20, with and without each optional argument."""
    torch.manual_seed(draw(st.integers(0, 999)))
    heads, groups = draw(st.sampled_from(HEADS))
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, max_length))
    values = inputs(op, rows, length, heads, groups, scale=draw(st.sampled_from([1e-3, 0.5, 17.0])))
    for name in ("D", "state"):
        if draw(st.booleans()):
            del values[name]
    if draw(st.booleans()):
        values["dt_bias"] = torch.rand(heads)
    if draw(st.booleans()):
        values |= {"dt_softplus": True, "dt": values["dt"] - 2}
    if draw(st.booleans()):
        values["dt_limit"] = (0.1, 9.0)
    return values | {"chunk": draw(st.none() | st.integers(1, max_length + 10))}


def recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The op with these shapes, in fp64."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    is_selective_scan = x.ndim == 3
    if is_selective_scan:
        x, state = x[..., None], None if state is None else state[:, :, None]
    rows, length, heads, width = x.shape
    groups, size = B.shape[2:]
    rates = A if is_selective_scan else A[:, None].expand(heads, size)
    B, C = (torch.stack([t[:, :, head * groups // heads] for head in range(heads)], 2) for t in (B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.double()
    if dt_softplus:
        dt = torch.logaddexp(dt, torch.zeros_like(dt))
    dt = dt.clamp(*dt_limit)
    h = x.new_zeros(rows, heads, width, size) if state is None else state.double()
    ys = []
    for t in range(length):
        if segments is not None and t:
            h = torch.where((segments[:, t] == segments[:, t - 1])[:, None, None, None], h, 0.0)
        step = dt[:, t, :, None, None]
        after = torch.exp(step * rates[:, None]) * h + step * x[:, t, :, :, None] * B[:, t, :, None]
        h = after if lengths is None else torch.where((t < lengths)[:, None, None, None], after, h)
        ys.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1) if ys else x
    if D is not None:
        y = y + D.double()[:, None] * x
    return (y.squeeze(3), h.squeeze(2)) if is_selective_scan else (y, h)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    window: Tensor | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv` in fp64."""
    x, weight = x.double(), weight.double()
    rows, length, channels = x.shape
    reach = weight.shape[1] - 1
    before = x.new_zeros(rows, reach, channels) if window is None else window.double()
    seen = torch.cat([before, x], 1)
    ys = []
    for t in range(length):
        total = torch.zeros_like(x[:, 0]) if bias is None else bias.double().expand(rows, -1)
        for back in range(reach + 1):
            term = weight[:, reach - back] * seen[:, t + reach - back]
            if segments is not None and back:
                same = segments[:, t] == segments[:, t - back] if back <= t else torch.zeros(rows, dtype=torch.bool)
                term = torch.where(same[:, None], term, 0.0)
            total = total + term
        ys.append(total * torch.sigmoid(total))
    ends = torch.full((rows,), length) if lengths is None else lengths
    last = torch.stack([seen[row, end : end + reach] for row, end in enumerate(ends.tolist())])
    return torch.stack(ys, 1) if ys else x, last


def relative(actual: Tensor, expected: Tensor) -> float:
    """Maximum error divided by maximum value."""
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def positions(values: Values, part: slice) -> Values:
    """The same call, restricted to some positions."""
    return {name: value[:, part] if name in SEQUENCES else value for name, value in values.items()}


def row(values: Values, index: int) -> Values:
    """The same call, restricted to one row."""
    by_row = (*SEQUENCES, "state")
    return {name: value[index : index + 1] if name in by_row else value for name, value in values.items()}
