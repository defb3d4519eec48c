"""State of a language model with attention: a growing key-value cache per row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ssmvl.errors import ShapeError


class KeyValueState:
    """A `DynamicCache` of transformers whose rows may differ in length; each row ends at the last slot.

    Shorter rows are preceded by masked slots. The positions of a row are therefore contiguous, however it was padded,
    and code that counts slots instead of positions (sliding windows) stays correct.

    Args:
        model: description of the architecture to which the state belongs.
        cache: keys and values, (B, heads, slots, head width) per layer.
        lengths: (B,) number of positions read in each row.
    """

    def __init__(self, model: str, cache: Any, lengths: Tensor) -> None:
        self.model, self.cache, self.lengths = model, cache, lengths

    @property
    def slots(self) -> int:
        """Number of slots per row, masked ones included."""
        return int(self.cache.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.lengths.nbytes + sum(k.nbytes + v.nbytes for k, v in self._layers())

    def check(self, model: str, rows: int, device: torch.device) -> None:
        """Check that this is a state of `model` with `rows` rows on `device`.

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
        """Attention mask (B, slots + length): 1 for real slots and for the next `length` positions, else 0."""
        slots = self.slots
        index = torch.arange(slots + length, device=self.lengths.device)
        return (index >= slots - self.lengths[:, None]).long()

    def advance(self, lengths: Tensor, padding: Tensor) -> None:
        """Add `lengths` (B,) read positions to each row, and drop the `padding` (B,) slots after them."""
        self.lengths = self.lengths + lengths
        slots = (torch.arange(self.slots, device=lengths.device) - padding[:, None]).clamp(min=0)
        for layer in self.cache.layers:
            layer.keys, layer.values = _take(layer.keys, slots), _take(layer.values, slots)

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """A copy of these rows, in this order; an index may repeat."""
        chosen = torch.atleast_1d(torch.as_tensor(index, device=self.lengths.device))
        if chosen.is_floating_point() or chosen.ndim != 1:
            raise ShapeError(f"rows must be selected by a list of integers or a mask, received {index}")
        chosen = chosen if chosen.dtype == torch.bool else chosen.long()
        cache = type(self.cache)()
        for number, (keys, values) in enumerate(self._layers()):
            cache.update(keys[chosen], values[chosen], number)
        return type(self)(self.model, cache, self.lengths[chosen])

    def write(self, index: Tensor | Sequence[int], other: Self) -> None:
        """Not supported: rows of keys and values differ in length.

        Raises:
            ShapeError: always.
        """
        raise ShapeError(
            f"rows of a state of {self.model} grow and cannot be overwritten (recurrent is False); "
            "select rows with rows(), or read them again into a new_state"
        )

    def clone(self) -> Self:
        """A copy."""
        return self.rows(range(len(self.lengths)))

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in self.cache.layers]


@functools.cache
def no_cache() -> Any:
    """A cache that stores nothing: a layer attends only to the keys and values of the current call.

    Without a cache, transformers looks for packed rows, which synchronizes with the device and builds a (B, 1, T, T)
    mask instead of using plain causal attention.
    """
    from transformers import DynamicCache

    class NoCache(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return key_states, value_states

    return NoCache()


def _take(tensor: Tensor, slots: Tensor) -> Tensor:
    """Select slots `slots[b]` (B, S) of each row b: (B, heads, S', P) -> (B, heads, S, P)."""
    return tensor.gather(2, slots[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
