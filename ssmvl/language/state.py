"""State of a recurrent language model: the states of all its mixers."""

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
    """One state per layer; rows are the first axis of every tensor.

    Args:
        model: name of the architecture that the state belongs to; `write` and `load` reject any other.
        layers: the state of each layer, a named tuple of tensors.
    """

    def __init__(self, model: str, layers: Sequence[NamedTuple]) -> None:
        self.model, self.layers = model, list(layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self._named())

    def check(self, model: str, rows: int, weight: Tensor) -> None:
        """Check that this is a state of `model` with `rows` rows, in the dtype and on the device of its `weight`.

        Raises:
            ShapeError: one of these differs.
        """
        if model != self.model:
            raise ShapeError(f"a state of {self.model} cannot be used by {model}; make one with its new_state({rows})")
        first: Tensor = self.layers[0][0]
        own_rows = first.shape[0]
        if (first.dtype, first.device) != (weight.dtype, weight.device):
            expected = f"{weight.dtype} on {weight.device}"
            raise ShapeError(f"the model needs a state in {expected}, received one in {first.dtype} on {first.device}")
        if rows != own_rows:
            raise ShapeError(
                f"a state of {own_rows} rows cannot be used for {rows}; make one with new_state({rows}), or use rows()"
            )

    def rows(self, index: Tensor | Sequence[int]) -> Self:
        """A copy of these rows, in this order; an index may repeat."""
        return type(self)(self.model, [type(s)(*(t[_index(index, t)] for t in s)) for s in self.layers])

    def write(self, index: Tensor | Sequence[int], other: Self) -> None:
        """Overwrite these rows with the rows of `other`.

        Raises:
            ShapeError: `other` belongs to another model, has other shapes, or does not have one row for each index.
        """
        if other.model != self.model:
            raise ShapeError(f"a state of {other.model} cannot be written into a state of {self.model}")
        pairs = list(zip(self._named(), other._named(), strict=True))
        count, rows = len(self.rows(index).layers[0][0]), other.layers[0][0].shape[0]
        if count != rows:
            raise ShapeError(f"{count} rows cannot be overwritten with {rows}; pass one index for each row")
        for (name, target), (_, source) in pairs:
            if target.shape[1:] != source.shape[1:]:
                shape, received = tuple(target.shape[1:]), tuple(source.shape[1:])
                raise ShapeError(f"{name} must have shape {shape} per row, received {received}")
        for (_, target), (_, source) in pairs:
            target[_index(index, target)] = source.to(target.dtype)

    def clone(self) -> Self:
        """A copy."""
        return type(self)(self.model, [type(s)(*(t.clone() for t in s)) for s in self.layers])

    def save(self, path: str | Path) -> None:
        """Save to a safetensors file, with the model's name and the format version."""
        write_tensors(path, dict(self._named()), {"state_format": FORMAT_VERSION, "model": self.model})

    def load(self, path: str | Path) -> None:
        """Overwrite this state with a saved one of the same model, rows and dtype.

        Raises:
            CheckpointError: the file does not hold such a state; names the difference.
        """
        tensors, metadata = read_tensors(path)
        for key, expected in (("state_format", FORMAT_VERSION), ("model", self.model)):
            if metadata.get(key) != expected:
                raise CheckpointError(f"{path}: {key} is {metadata.get(key)!r}, but this state needs {expected!r}")
        for name, target in self._named():
            saved = tensors.get(name)
            if saved is None or saved.shape != target.shape or saved.dtype != target.dtype:
                actual = "missing" if saved is None else f"{saved.dtype} {tuple(saved.shape)}"
                needed = f"{target.dtype} {tuple(target.shape)}"
                raise CheckpointError(f"{path}: {name} is {actual}, but this state needs {needed}")
        for name, target in self._named():
            target.copy_(tensors[name])

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for i, layer in enumerate(self.layers):
            for name, tensor in layer._asdict().items():
                yield f"{i}.{name}", tensor


def _index(index: Tensor | Sequence[int], tensor: Tensor) -> Tensor:
    indices = torch.atleast_1d(torch.as_tensor(index, device=tensor.device))
    if indices.is_floating_point() or indices.ndim != 1:
        raise ShapeError(f"rows must be chosen by a list of integers or a mask, received {index}")
    return indices if indices.dtype == torch.bool else indices.long()
