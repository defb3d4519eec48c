"""Forward and backward of one micro-batch on `meta`, and the memory in use at their peaks.

Three of several identical consecutive blocks are run; what the middle one keeps is counted for all in between.
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

RUN = 3  # blocks run of identical consecutive ones: the first, one that stands for those in between, the last


@dataclass(frozen=True)
class WorstBatch:
    """A micro-batch whose samples have one image and then text, with every text token supervised.

    Attributes:
        samples: number of samples, B.
        text: text tokens per sample.
        packed: whether the samples are packed into one row.
    """

    samples: int
    text: int
    packed: bool

    def inputs(self, model: VisionLanguageModel) -> dict[str, Any]:
        """Return the inputs of `VisionLanguageModel.forward`, on `meta`."""
        image_tokens, count = model.tokens_per_image, self.samples
        total = image_tokens + self.text
        shape = (1, count * total) if self.packed else (count, total)
        with torch.device("meta"):
            rows = {"segments": torch.zeros(shape, dtype=torch.int32)} if self.packed else {}
            return rows | {
                "ids": torch.zeros(shape, dtype=torch.int64),
                "image_positions": torch.zeros(count * image_tokens, dtype=torch.int64),
                "label_positions": torch.zeros(count * self.text, dtype=torch.int64),
                "images": {s: torch.zeros(count, 3, s.size, s.size, dtype=torch.uint8) for s in model.image_specs},
            }


def peaks(model: VisionLanguageModel, batch: WorstBatch, *, gpu: bool, shards: int, again: bool) -> list[Counter[str]]:
    """Return the bytes in use at each peak, by kind, except parameters, optimizer states and gathered shards.

    Args:
        model: the model on `meta`; `requires_grad` marks its trained parameters.
        batch: the micro-batch that it reads.
        gpu: whether to emulate bf16 autocast on a GPU; else fp32 on a CPU.
        shards: number of ranks across which a gradient is sharded as soon as it is complete.
        again: whether gradients of an earlier micro-batch already exist; then all gradients count at every moment.

    Returns:
        Two moments for the forward pass, then two for each stretch of the backward pass between two units: when the
        most bytes are in use, and when the most bytes other than gradients are. Each further sample adds about the same
        number of bytes to each moment.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ledger = Ledger((batch.samples * batch.text, cast(LanguageModel, model.language).vocab_rows))
    device = Device(gpu, ledger)
    with ExitStack() as stack:
        for run in _runs(model):
            stack.enter_context(_shortened(*run, ledger))
        for unit in model.shard_units():
            stack.callback(unit.register_forward_hook(ledger.start_phase_in_backward).remove)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter) if again else None
            hook = parameter.register_post_accumulate_grad_hook(lambda p: ledger.complete(p, shards))
            stack.callback(hook.remove)
        stack.enter_context(patch.object(torch, "autocast", autocast_on_meta))
        inputs = batch.inputs(model)
        for tensor in (*model.parameters(), *(p.grad for p in trained if p.grad is not None)):
            ledger.ignore(tensor)
        with ledger, device:
            logits = model(**inputs)  # kept until the end, as Composer does
            labels = torch.zeros(len(logits), dtype=torch.int64, device="meta")
            loss = F.cross_entropy(logits.float(), labels, reduction="sum") / len(labels)
            device.end_forward()
            ledger.begin()
            torch.autograd.backward(loss)  # `loss.backward()` would be intercepted by `device`, and run outside it
    for parameter in trained:
        parameter.grad = None
    existing = Counter({GRADIENTS: sum(-(-p.nbytes // shards) for p in trained) if again else 0})
    for moment in ledger.moments:
        moment.update(existing)
    return ledger.moments


def _runs(model: nn.Module) -> Iterator[tuple[nn.ModuleList, list[str]]]:
    """Yield the list and keys of each run of more than three identical consecutive shard units."""
    units = {*cast(VisionLanguageModel, model).shard_units()}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and units.issuperset(module):
            for _, run in groupby(module.named_children(), lambda child: _signature(child[1])):
                keys = [key for key, _ in run]
                if len(keys) > RUN:
                    yield module, keys


def _signature(unit: nn.Module) -> tuple[Any, ...]:
    return type(unit), *((name, p.shape, p.dtype, p.requires_grad) for name, p in unit.named_parameters())


@contextmanager
def _shortened(blocks: nn.ModuleList, keys: list[str], ledger: Ledger) -> Iterator[None]:
    """Keep three of these blocks; the second stands for all except the first and the last."""
    kept_keys = {keys[0], keys[1], keys[-1]}
    kept = {key: block for key, block in blocks.named_children() if key in kept_keys or key not in keys}
    middle, count = blocks[int(keys[1])], len(keys) - 2
    live_before: list[set[int]] = []

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        live_before.append(ledger.live())
        if args[0].requires_grad:
            args[0].register_hook(lambda _: setattr(ledger, "paused", False))

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = first(output)
        if hidden.requires_grad:
            ledger.multiply(live_before.pop(), count)
            hidden.register_hook(lambda _: setattr(ledger, "paused", args[0].requires_grad))

    ledger.multiply_gradients(middle.parameters(), count)
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
