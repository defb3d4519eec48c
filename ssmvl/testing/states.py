"""What a mixer and a language model have in common: they read embeddings, all at once or on from a state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmvl.interfaces import State
from ssmvl.model.blueprint import require_contract
from ssmvl.testing.common import require, require_apart, require_equal, require_tensor

ROWS, LENGTH = 3, 12


@dataclass(frozen=True)
class Reader:
    """A mixer or a language model."""

    name: str
    width: int
    forward: Callable[[Tensor, Tensor | None], Tensor]
    prefill: Callable[[Tensor, Tensor, Any], Tensor]
    step: Callable[[Tensor, Any], Tensor]
    new_state: Callable[[int], Any]
    shortest: int  # positions that a row of a prefill may have
    recurrent: bool = True


@torch.no_grad()
def check_reader(reader: Reader) -> None:
    """It is causal, keeps rows and segments apart, and reads on from its state as if it had read all at once.

    Raises:
        ContractError: it does not.
    """
    require_contract(reader.new_state(ROWS), f"the state of {reader.name}", State)
    x = torch.randn(ROWS, LENGTH, reader.width)
    y = reader.forward(x, None)
    require_tensor(reader.name, y, ROWS, LENGTH, reader.width)
    for at in range(1, LENGTH):
        changed = x.clone()
        changed[:, at] += 1
        what = f"{reader.name} must be causal; a change at position {at} reaches an earlier one"
        require_equal(what, reader.forward(changed, None)[:, :at], y[:, :at])
    require_apart(reader.name, lambda x: reader.forward(x, None), x)
    if reader.recurrent:
        _check_segments(reader, x)
    _check_steps(reader, x)
    _check_splits(reader, x)
    _check_state(reader, x)


def _check_segments(reader: Reader, x: Tensor) -> None:
    """Two packed rows; the second ends in padding."""
    packed = [4, 8], [3, 1, 5]
    segments = torch.full((2, LENGTH), -1, dtype=torch.int32)
    for row, lengths in enumerate(packed):
        segments[row, : sum(lengths)] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    y = reader.forward(x[:2], segments)
    for row, lengths in enumerate(packed):
        start = 0
        for number, length in enumerate(lengths):
            part = slice(start, start := start + length)
            what = f"{reader.name}: segment {number} of row {row} must be as it is alone"
            require_equal(what, y[row, part], reader.forward(x[row : row + 1, part], None)[0])


def _check_steps(reader: Reader, x: Tensor) -> None:
    """Right-padded rows of different lengths are read, then followed by three steps each."""
    lengths, rows = torch.tensor([7, 4, reader.shortest]), torch.arange(ROWS)
    state = reader.new_state(ROWS)
    y = reader.prefill(x[:, :7], lengths, state)
    require_tensor(f"{reader.name}.prefill", y, ROWS, 7, reader.width)
    stepped = torch.stack([reader.step(x[rows, lengths + i], state) for i in range(3)], dim=1)
    require_tensor(f"{reader.name}.step, three times,", stepped, ROWS, 3, reader.width)
    for row, length in enumerate(lengths.tolist()):
        alone = reader.forward(x[row : row + 1, : length + 3], None)[0]
        where = f"row {row}, {length} of 7 positions long, must equal forward of that row alone"
        if length:
            require_equal(f"{reader.name}.prefill: {where}", y[row, :length], alone[:length])
        require_equal(f"{reader.name}.step after prefill: {where}", stepped[row], alone[length:])


def _check_splits(reader: Reader, x: Tensor) -> None:
    """A prefill in two parts, wherever it is cut; a row that is shorter than the first has nothing left."""
    lengths = torch.tensor([LENGTH, 7, 4] if reader.shortest == 0 else [LENGTH] * ROWS)
    real = (torch.arange(LENGTH) < lengths[:, None])[..., None]
    whole = reader.new_state(ROWS)
    y, after = reader.prefill(x, lengths, whole), reader.step(x[:, 0], whole)
    for cut in range(1, LENGTH):
        state = reader.new_state(ROWS)
        first = reader.prefill(x[:, :cut], lengths.clamp(max=cut), state)
        second = reader.prefill(x[:, cut:], (lengths - cut).clamp(min=0), state)
        what = f"{reader.name}: a prefill cut at position {cut} must be as one"
        require_equal(what, torch.where(real, torch.cat([first, second], dim=1), 0), torch.where(real, y, 0))
        require_equal(f"{what}, in the step that follows", reader.step(x[:, 0], state), after)


def _check_state(reader: Reader, x: Tensor) -> None:
    """Copies of a state, whole or by rows, go their own way; rows can be overwritten."""
    name, same = reader.name, x[:1, 0].expand(ROWS, -1)  # the same next input: what differs is the state
    fresh, state = reader.new_state(ROWS), reader.new_state(ROWS)
    size = state.nbytes
    reader.prefill(x, torch.full((ROWS,), LENGTH), state)
    chosen, other = state.rows([2, 0]), state.clone()
    if reader.recurrent:
        fixed = 0 < size == state.nbytes and chosen.nbytes * ROWS == size * 2
        sizes = f"{size} bytes at first, {state.nbytes} after a prefill, {chosen.nbytes} of 2 rows of {ROWS}"
        require(fixed, f"{name}: each row of a state has the same fixed size: {sizes}")
        fresh.write([1], state.rows([2]))
    expected = reader.step(same, other)
    require_equal(f"{name}: state.rows([2, 0]) must hold these rows", reader.step(same[:2], chosen), expected[[2, 0]])
    require_equal(f"{name}: rows and clones must be copies, one changed the state", reader.step(same, state), expected)
    if reader.recurrent:
        unread = reader.step(same, reader.new_state(ROWS))
        written = torch.stack([unread[0], expected[2], unread[2]])
        require_equal(f"{name}: state.write([1], …) must set row 1 only", reader.step(same, fresh), written)
