"""Checks shared by mixers and language models: reading embeddings all at once or from a state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmvl.interfaces import State
from ssmvl.model.blueprint import require_contract
from ssmvl.testing.common import require, require_equal, require_independent_rows, require_tensor

ROWS, LENGTH = 3, 12


@dataclass(frozen=True)
class Reader:
    """The common interface of a mixer or a language model."""

    name: str
    width: int
    forward: Callable[[Tensor, Tensor | None], Tensor]
    prefill: Callable[[Tensor, Tensor, Any], Tensor]
    step: Callable[[Tensor, Any], Tensor]
    new_state: Callable[[int], Any]
    min_length: int  # the smallest number of positions that a row of a prefill may have
    recurrent: bool = True


@torch.no_grad()
def check_reader(reader: Reader) -> None:
    """Check causality, isolation of rows and segments, and that continuing from a state equals reading all at once.

    Raises:
        ContractError: a requirement is violated.
    """
    require_contract(reader.new_state(ROWS), f"the state of {reader.name}", State)
    x = torch.randn(ROWS, LENGTH, reader.width)
    y = reader.forward(x, None)
    require_tensor(reader.name, y, ROWS, LENGTH, reader.width)
    for position in range(1, LENGTH):
        changed = x.clone()
        changed[:, position] += 1
        what = f"{reader.name} must be causal, but a change at position {position} affects an earlier one"
        require_equal(what, reader.forward(changed, None)[:, :position], y[:, :position])
    require_independent_rows(reader.name, lambda x: reader.forward(x, None), x)
    if reader.recurrent:
        _check_segments(reader, x)
    _check_steps(reader, x)
    _check_splits(reader, x)
    _check_state(reader, x)


def _check_segments(reader: Reader, x: Tensor) -> None:
    """Check segments of two packed rows; the second ends in padding."""
    packed = [4, 8], [3, 1, 5]
    segments = torch.full((2, LENGTH), -1, dtype=torch.int32)
    for row, lengths in enumerate(packed):
        segments[row, : sum(lengths)] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    y = reader.forward(x[:2], segments)
    for row, lengths in enumerate(packed):
        start = 0
        for number, length in enumerate(lengths):
            part = slice(start, start := start + length)
            what = f"{reader.name}: segment {number} of row {row} must give the same result alone and packed"
            require_equal(what, y[row, part], reader.forward(x[row : row + 1, part], None)[0])


def _check_steps(reader: Reader, x: Tensor) -> None:
    """Check a prefill of right-padded rows of different lengths, followed by three steps."""
    lengths, rows = torch.tensor([7, 4, reader.min_length]), torch.arange(ROWS)
    state = reader.new_state(ROWS)
    y = reader.prefill(x[:, :7], lengths, state)
    require_tensor(f"{reader.name}.prefill", y, ROWS, 7, reader.width)
    stepped = torch.stack([reader.step(x[rows, lengths + i], state) for i in range(3)], dim=1)
    require_tensor(f"{reader.name}.step, three times,", stepped, ROWS, 3, reader.width)
    for row, length in enumerate(lengths.tolist()):
        alone = reader.forward(x[row : row + 1, : length + 3], None)[0]
        where = f"row {row}, of length {length} padded to 7, must equal forward of that row alone"
        if length:
            require_equal(f"{reader.name}.prefill: {where}", y[row, :length], alone[:length])
        require_equal(f"{reader.name}.step after prefill: {where}", stepped[row], alone[length:])


def _check_splits(reader: Reader, x: Tensor) -> None:
    """Check a prefill split in two at every position; a row shorter than the first part has length 0 in the second."""
    lengths = torch.tensor([LENGTH, 7, 4] if reader.min_length == 0 else [LENGTH] * ROWS)
    real = (torch.arange(LENGTH) < lengths[:, None])[..., None]
    whole = reader.new_state(ROWS)
    y, after = reader.prefill(x, lengths, whole), reader.step(x[:, 0], whole)
    for cut in range(1, LENGTH):
        state = reader.new_state(ROWS)
        first = reader.prefill(x[:, :cut], lengths.clamp(max=cut), state)
        second = reader.prefill(x[:, cut:], (lengths - cut).clamp(min=0), state)
        what = f"{reader.name}: a prefill split at position {cut} must equal an unsplit one"
        require_equal(what, torch.where(real, torch.cat([first, second], dim=1), 0), torch.where(real, y, 0))
        require_equal(f"{what}, also in the next step", reader.step(x[:, 0], state), after)


def _check_state(reader: Reader, x: Tensor) -> None:
    """Check that copies of a state, or of some of its rows, are independent, and that rows can be overwritten."""
    name, same = reader.name, x[:1, 0].expand(ROWS, -1)  # equal next inputs, so that only the states differ
    fresh, state = reader.new_state(ROWS), reader.new_state(ROWS)
    size = state.nbytes
    reader.prefill(x, torch.full((ROWS,), LENGTH), state)
    chosen, other = state.rows([2, 0]), state.clone()
    if reader.recurrent:
        fixed = 0 < size == state.nbytes and chosen.nbytes * ROWS == size * 2
        sizes = f"{size} bytes at first, {state.nbytes} after a prefill, {chosen.nbytes} for 2 of {ROWS} rows"
        require(fixed, f"{name}: all rows of a state must have the same fixed size, received {sizes}")
        fresh.write([1], state.rows([2]))
    expected = reader.step(same, other)
    what = f"{name}: state.rows([2, 0]) must contain these rows in this order"
    require_equal(what, reader.step(same[:2], chosen), expected[[2, 0]])
    what = f"{name}: rows() and clone() must return copies, but using one changed the state"
    require_equal(what, reader.step(same, state), expected)
    if reader.recurrent:
        unread = reader.step(same, reader.new_state(ROWS))
        written = torch.stack([unread[0], expected[2], unread[2]])
        require_equal(f"{name}: state.write([1], …) must set only row 1", reader.step(same, fresh), written)
