"""The state of a language model with attention: keys and values of each row, which grow."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ssmvl.errors import ShapeError


class KeyValueState:
    """A `DynamicCache` of transformers whose rows may differ in length: each ends at the last slot.

    In front of a shorter row lie slots that are masked. So the positions of a row lie side by side, whatever was
    padded, and what counts slots instead of positions (sliding windows) counts right.

    Args:
        model: names the architecture the state belongs to.
        cache: keys and values, (B, heads, slots, head width) of each layer.
        lengths: (B,) positions that each row has read.
    """

    def __init__(self, model: str, cache: Any, lengths: Tensor) -> None:
        self.model, self.cache, self.lengths = model, cache, lengths

    @property
    def slots(self) -> int:
        """Slots of every row, masked ones included."""
        return int(self.cache.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.lengths.nbytes + sum(k.nbytes + v.nbytes for k, v in self._layers())

    def check(self, model: str, rows: int, device: torch.device) -> None:
        """Check that this is a state of `model`, of `rows` rows, on `device`.

        Raises:
            ShapeError: it is not.
        """
        if model != self.model:
            raise ShapeError(f"a state of {self.model} cannot be used by {model}; make one with its new_state({rows})")
        if device != self.lengths.device:
            raise ShapeError(f"the model needs a state on {device}, received one on {self.lengths.device}")
        own = len(self.lengths)
        if rows != own:
            raise ShapeError(
                f"a state of {own} rows cannot take {rows}; make one with new_state({rows}), or use rows()"
            )

    def mask(self, length: int) -> Tensor:
        """Which slots are real, (B, slots + length) of 0 and 1; the `length` positions to come count as real."""
        slots = self.slots
        index = torch.arange(slots + length, device=self.lengths.device)
        return (index >= slots - self.lengths[:, None]).long()

    def advance(self, lengths: Tensor, padding: Tensor) -> None:
        """Take note that each row has read `lengths` (B,) positions, and drop the `padding` (B,) slots behind them."""
        self.lengths = self.lengths + lengths
        slots = (torch.arange(self.slots, device=lengths.device) - padding[:, None]).clamp(min=0)
        for layer in self.cache.layers:
            layer.keys, layer.values = _take(layer.keys, slots), _take(layer.values, slots)

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """A copy of these rows, in this order; an index may repeat."""
        chosen = torch.atleast_1d(torch.as_tensor(index, device=self.lengths.device))
        if chosen.is_floating_point() or chosen.ndim != 1:
            raise ShapeError(f"rows are chosen by a list of numbers or a mask, received {index}")
        chosen = chosen if chosen.dtype == torch.bool else chosen.long()
        cache = type(self.cache)()
        for number, (keys, values) in enumerate(self._layers()):
            cache.update(keys[chosen], values[chosen], number)
        return type(self)(self.model, cache, self.lengths[chosen])

    def write(self, index: Tensor | Sequence[int], other: Self) -> None:
        """Refused: rows of keys and values differ in length.

        Raises:
            ShapeError: always.
        """
        raise ShapeError(
            f"rows of a state of {self.model} grow and cannot be overwritten (recurrent is False); "
            "choose rows with rows(), or read them anew into a new_state"
        )

    def clone(self) -> Self:
        """A copy."""
        return self.rows(range(len(self.lengths)))

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in self.cache.layers]


@functools.cache
def no_cache() -> Any:
    """A cache that keeps nothing: the keys and values of a layer are those it is given.

    Without any cache transformers looks for rows that are packed, which reads values back from the device and makes
    a mask of (B, 1, T, T) in place of plain causal attention.
    """
    from transformers import DynamicCache

    class NoCache(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return key_states, value_states

    return NoCache()


def _take(tensor: Tensor, slots: Tensor) -> Tensor:
    """(B, heads, S, P) with row b's slots `slots[b]` (B, S)."""
    return tensor.gather(2, slots[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
