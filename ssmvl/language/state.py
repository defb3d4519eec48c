"""The state of a recurrent language model: the states of its mixers, collected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ssmvl.checkpoints import read_tensors, write_tensors
from ssmvl.errors import CheckpointError, ShapeError

__all__ = ["RecurrentState"]

FORMAT_VERSION = "1"


class RecurrentState:
    """One state per layer; every tensor has the rows first.

    Args:
        model: names the architecture the state belongs to; `write` and `load` refuse any other.
        layers: each layer's state, a named tuple of tensors.
    """

    def __init__(self, model: str, layers: Sequence[NamedTuple]) -> None:
        self.model, self.layers = model, list(layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self._named())

    def check(self, model: str, rows: int, weight: Tensor) -> None:
        """Check that this is a state of `model`, of `rows` rows, in the dtype and on the device of its `weight`.

        Raises:
            ShapeError: it is not.
        """
        if model != self.model:
            raise ShapeError(f"a state of {self.model} cannot be used by {model}; make one with its new_state({rows})")
        first: Tensor = self.layers[0][0]
        own = first.shape[0]
        if (first.dtype, first.device) != (weight.dtype, weight.device):
            needs = f"{weight.dtype} on {weight.device}"
            raise ShapeError(f"the model needs a state in {needs}, received one in {first.dtype} on {first.device}")
        if rows != own:
            raise ShapeError(
                f"a state of {own} rows cannot take {rows}; make one with new_state({rows}), or use rows()"
            )

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """A copy of these rows, in this order; an index may repeat."""
        return type(self)(self.model, [type(s)(*(t[_index(index, t)] for t in s)) for s in self.layers])

    def write(self, index: Tensor | Sequence[int], other: Self) -> None:
        """Overwrite these rows with the rows of `other`.

        Raises:
            ShapeError: `other` belongs to another model, to one of other shapes, or has not one row for each index.
        """
        if other.model != self.model:
            raise ShapeError(f"a state of {other.model} cannot be written into a state of {self.model}")
        pairs = list(zip(self._named(), other._named(), strict=True))
        places, rows = len(self.rows(index).layers[0][0]), other.layers[0][0].shape[0]
        if places != rows:
            raise ShapeError(f"{places} rows cannot be overwritten with {rows}; give one index for each row")
        for (name, mine), (_, theirs) in pairs:
            if mine.shape[1:] != theirs.shape[1:]:
                raise ShapeError(f"{name} is {tuple(theirs.shape[1:])} a row there, {tuple(mine.shape[1:])} here")
        for (_, mine), (_, theirs) in pairs:
            mine[_index(index, mine)] = theirs.to(mine.dtype)

    def clone(self) -> Self:
        """A copy."""
        return type(self)(self.model, [type(s)(*(t.clone() for t in s)) for s in self.layers])

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, with the model's name and the format's version."""
        write_tensors(path, dict(self._named()), {"state_format": FORMAT_VERSION, "model": self.model})

    def load(self, path: str | Path) -> None:
        """Overwrite this state with a saved one of the same model, rows and dtype.

        Raises:
            CheckpointError: the file holds no such state; says what differs.
        """
        tensors, metadata = read_tensors(path)
        for key, expected in (("state_format", FORMAT_VERSION), ("model", self.model)):
            if metadata.get(key) != expected:
                raise CheckpointError(f"{path}: {key} is {metadata.get(key)!r}, this state needs {expected!r}")
        for name, mine in self._named():
            theirs = tensors.get(name)
            if theirs is None or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                got = "nothing" if theirs is None else f"{theirs.dtype} {tuple(theirs.shape)}"
                raise CheckpointError(f"{path}: {name} is {got}, this state needs {mine.dtype} {tuple(mine.shape)}")
        for name, mine in self._named():
            mine.copy_(tensors[name])

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for i, layer in enumerate(self.layers):
            for name, tensor in layer._asdict().items():
                yield f"{i}.{name}", tensor


def _index(index: Tensor | Sequence[int], tensor: Tensor) -> Tensor:
    found = torch.atleast_1d(torch.as_tensor(index, device=tensor.device))
    if found.is_floating_point() or found.ndim != 1:
        raise ShapeError(f"rows are chosen by a list of numbers or a mask, received {index}")
    return found if found.dtype == torch.bool else found.long()
