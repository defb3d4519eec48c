"""One micro-batch's forward and backward on `meta`, and the memory that is in use at their peak.

Of equal blocks in a row three are run, and what the middle one keeps counts for all between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

from ssmvl.interfaces import LanguageModel
from ssmvl.model.costs import autocast_on_meta
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.training.planning.device_emulation import Device
from ssmvl.training.planning.memory_ledger import GRADIENTS, Ledger, first

RUN = 3  # of equal blocks in a row: the first, one that stands for those between, the last


@dataclass(frozen=True)
class WorstBatch:
    """A micro-batch: samples of one image and then text, of which every token is supervised.

    Attributes:
        samples: B.
        text: tokens of each sample.
        packed: whether they stand in one row.
    """

    samples: int
    text: int
    packed: bool

    def inputs(self, model: VisionLanguageModel) -> dict[str, Any]:
        """What `VisionLanguageModel.forward` takes, on `meta`."""
        places, count = model.tokens_per_image, self.samples
        total = places + self.text
        shape = (1, count * total) if self.packed else (count, total)
        with torch.device("meta"):
            rows = {"segments": torch.zeros(shape, dtype=torch.int32)} if self.packed else {}
            return rows | {
                "ids": torch.zeros(shape, dtype=torch.int64),
                "image_positions": torch.zeros(count * places, dtype=torch.int64),
                "label_positions": torch.zeros(count * self.text, dtype=torch.int64),
                "images": {s: torch.zeros(count, 3, s.size, s.size, dtype=torch.uint8) for s in model.image_specs},
            }


def peaks(model: VisionLanguageModel, batch: WorstBatch, *, gpu: bool, shards: int, again: bool) -> list[Counter[str]]:
    """Bytes in use when most are, by kind, beyond parameters, optimizer and what sharding gathers.

    Args:
        model: on `meta`; which parameters are trained is said by `requires_grad`.
        batch: what it reads.
        gpu: whether under bf16 autocast on a GPU; else in fp32 on a CPU.
        shards: ranks over which gradients are shared out as soon as they are complete.
        again: whether gradients are there already, from a micro-batch before; they are then counted whole.

    Returns:
        Of forward, then of each stretch of backward between two units: when most is in use, and when most is apart from
        gradients. Every further sample adds about the same to each.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ledger = Ledger((batch.samples * batch.text, cast(LanguageModel, model.language).vocab_rows))
    device = Device(gpu, ledger)
    with ExitStack() as stack:
        for run in _runs(model):
            stack.enter_context(_shortened(*run, ledger))
        for unit in model.shard_units():
            stack.callback(unit.register_forward_hook(ledger.divide).remove)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter) if again else None
            kept = parameter.register_post_accumulate_grad_hook(lambda p: ledger.complete(p, shards))
            stack.callback(kept.remove)
        stack.enter_context(patch.object(torch, "autocast", autocast_on_meta))
        inputs = batch.inputs(model)
        for held in (*model.parameters(), *(p.grad for p in trained if p.grad is not None)):
            ledger.ignore(held)
        with ledger, device:
            logits = model(**inputs)  # held until the end, as Composer does
            labels = torch.zeros(len(logits), dtype=torch.int64, device="meta")
            loss = F.cross_entropy(logits.float(), labels, reduction="sum") / len(labels)
            device.leave_forward()
            ledger.begin()
            torch.autograd.backward(loss)  # `loss.backward()` would leave `device`, as every call that it sees does
    for parameter in trained:
        parameter.grad = None
    there = Counter({GRADIENTS: sum(-(-p.nbytes // shards) for p in trained) if again else 0})
    for most in ledger.moments:
        most.update(there)
    return ledger.moments


def _runs(model: nn.Module) -> Iterator[tuple[nn.ModuleList, list[str]]]:
    """More than three equal shard units in a row: their list, and their keys there."""
    units = {*cast(VisionLanguageModel, model).shard_units()}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and units.issuperset(module):
            for _, run in groupby(module.named_children(), lambda child: _looks(child[1])):
                keys = [key for key, _ in run]
                if len(keys) > RUN:
                    yield module, keys


def _looks(unit: nn.Module) -> tuple[Any, ...]:
    return type(unit), *((name, p.shape, p.dtype, p.requires_grad) for name, p in unit.named_parameters())


@contextmanager
def _shortened(blocks: nn.ModuleList, keys: list[str], ledger: Ledger) -> Iterator[None]:
    """Leave three of these blocks, of which the second counts for all but the first and the last."""
    stays = {keys[0], keys[1], keys[-1]}
    kept = {key: block for key, block in blocks.named_children() if key in stays or key not in keys}
    middle, count = blocks[int(keys[1])], len(keys) - 2
    since: list[set[int]] = []

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        since.append(ledger.live())
        if args[0].requires_grad:
            args[0].register_hook(lambda _: setattr(ledger, "paused", False))

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = first(output)
        if hidden.requires_grad:
            ledger.multiply(since.pop(), count)
            hidden.register_hook(lambda _: setattr(ledger, "paused", args[0].requires_grad))

    ledger.stands_for(middle.parameters(), count)
    hooks: list[Callable[[], None]] = [
        middle.register_forward_pre_hook(enter).remove,
        middle.register_forward_hook(leave).remove,
    ]
    with patch.dict(cast(Mapping[str, Any], blocks._modules), kept, clear=True):
        try:
            yield
        finally:
            for remove in hooks:
                remove()
