"""What is in use while a model runs, by storage: nothing is measured, so it may run on `meta`."""

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
    """What is live, by storage, and what was live when most was, in each phase."""

    def __init__(self, logits: tuple[int, int]) -> None:
        super().__init__()
        self.moments: list[Counter[str]] = []
        self.paused = False  # while a block that stands for many is in backward
        self._now: Counter[str] = Counter()
        self._held: dict[int, tuple[str, int]] = {}
        self._counts: dict[nn.Parameter, int] = {}
        self._logits = logits
        self.begin()

    def begin(self) -> None:
        """Begin a phase."""
        self.moments += Counter(), Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = run_on_meta(func, args, kwargs or {})
        for made in output if isinstance(output, list | tuple) else (output,):
            if isinstance(made, Tensor) and _key(made) not in self._held:
                self._enter(made, LOGITS if made.shape == self._logits else ACTIVATIONS, 1)
        if not self.paused:
            for place, size in ((-2, Counter.total), (-1, _without_gradients)):
                if size(self._now) > size(self.moments[place]):
                    self.moments[place] = self._now.copy()
        return output

    def ignore(self, tensor: Tensor) -> None:
        """Count it nowhere."""
        self._enter(tensor, "", 0)

    def call(self, tensor: Tensor, kind: str) -> None:
        """Count it as another kind."""
        self._change(_key(tensor), kind, self._held[_key(tensor)][1])

    def divide(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Let another phase begin when backward comes to this unit."""
        hidden = first(output)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.begin())

    def live(self) -> set[int]:
        """Storages that are."""
        return set(self._held)

    def multiply(self, since: set[int], count: int) -> None:
        """Let what is live now and was not then count for so many blocks."""
        for key in self._held.keys() - since:
            kind, size = self._held[key]
            self._change(key, kind, size * count)

    def stands_for(self, parameters: Iterator[nn.Parameter], count: int) -> None:
        """Let gradients of these count for so many blocks."""
        self._counts.update(dict.fromkeys(parameters, count))

    def complete(self, parameter: nn.Parameter, shards: int) -> None:
        """Its gradient is accumulated: of it each rank keeps a share."""
        grad = cast(Tensor, parameter.grad)
        if self._held[_key(grad)][1]:  # else it was there before
            self._change(_key(grad), GRADIENTS, -(-grad.nbytes // shards) * self._counts.get(parameter, 1))

    def _change(self, key: int, kind: str, size: int) -> None:
        old, before = self._held[key]
        self._now[old] -= before
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
    """Of what a unit returns: layers of transformers may return more."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
