"""Ledger of live memory while a model runs, by storage. Sizes are computed, not measured, so it works on `meta`."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssmvl.model.costs import run_on_meta

CASTS, ACTIVATIONS, LOGITS, GRADIENTS = "bf16 weights", "activations", "logits and loss", "gradients"


class Ledger(TorchDispatchMode):
    """Tracks live storages. Records the bytes by kind at two peaks of each phase: of all bytes, and without gradients.

    Args:
        logits: shape of the logits; tensors of this shape count as `LOGITS`.
    """

    def __init__(self, logits: tuple[int, int]) -> None:
        super().__init__()
        self.moments: list[Counter[str]] = []
        self.paused = False  # True while the block that represents several runs backward
        self._now: Counter[str] = Counter()
        self._held: dict[int, tuple[str, int]] = {}
        self._counts: dict[nn.Parameter, int] = {}
        self._logits = logits
        self.begin()

    def begin(self) -> None:
        """Start a phase."""
        self.moments += Counter(), Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = run_on_meta(func, args, kwargs or {})
        for result in output if isinstance(output, list | tuple) else (output,):
            if isinstance(result, Tensor) and _key(result) not in self._held:
                self._enter(result, LOGITS if result.shape == self._logits else ACTIVATIONS, 1)
        if not self.paused:
            for index, size in ((-2, Counter.total), (-1, _without_gradients)):
                if size(self._now) > size(self.moments[index]):
                    self.moments[index] = self._now.copy()
        return output

    def ignore(self, tensor: Tensor) -> None:
        """Exclude a tensor from the counts."""
        self._enter(tensor, "", 0)

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor as a different kind."""
        self._change(_key(tensor), kind, self._held[_key(tensor)][1])

    def start_phase_in_backward(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook that starts a phase when the backward pass reaches this unit."""
        hidden = first(output)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.begin())

    def live(self) -> set[int]:
        """Return the keys of all live storages."""
        return set(self._held)

    def multiply(self, live_before: set[int], count: int) -> None:
        """Count every live storage that is not in `live_before` `count` times, once per block that it represents."""
        for key in self._held.keys() - live_before:
            kind, size = self._held[key]
            self._change(key, kind, size * count)

    def multiply_gradients(self, parameters: Iterator[nn.Parameter], count: int) -> None:
        """Count the gradients of these parameters `count` times, once per block that they represent."""
        self._counts.update(dict.fromkeys(parameters, count))

    def complete(self, parameter: nn.Parameter, shards: int) -> None:
        """Record that a gradient is accumulated: each rank keeps only its shard."""
        grad = cast(Tensor, parameter.grad)
        if self._held[_key(grad)][1]:  # else it existed before, and is ignored
            self._change(_key(grad), GRADIENTS, -(-grad.nbytes // shards) * self._counts.get(parameter, 1))

    def _change(self, key: int, kind: str, size: int) -> None:
        old_kind, old_size = self._held[key]
        self._now[old_kind] -= old_size
        self._now[kind] += size
        self._held[key] = kind, size

    def _enter(self, tensor: Tensor, kind: str, count: int) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes() * count
        self._held[storage._cdata] = kind, size
        self._now[kind] += size
        weakref.finalize(storage, self._leave, storage._cdata)

    def _leave(self, key: int) -> None:
        kind, size = self._held.pop(key)
        self._now[kind] -= size


def _without_gradients(sizes: Counter[str]) -> int:
    return sizes.total() - sizes[GRADIENTS]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def first(output: Any) -> Tensor:
    """Return the hidden states from a unit's output, which may be a tuple for layers from the transformers library."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
