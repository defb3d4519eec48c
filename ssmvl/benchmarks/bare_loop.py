"""A language model under AdamW in bf16 autocast, without Composer and data: how fast it trains, reads and writes."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmvl.benchmarks.limits import Shape, seconds
from ssmvl.benchmarks.memory import build
from ssmvl.benchmarks.model_cases import Row, operations
from ssmvl.language.mamba_lm import MambaLM
from ssmvl.ops.backends import report
from ssmvl.training.activation_checkpointing import checkpoint_activations

# Dense bf16 products, TFLOP/s, from the makers' data sheets, by the name that CUDA gives the card.
PEAKS: Mapping[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA A10": 125,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 4090": 165,
}
WARM, TIMED = 3, 10  # steps


class Loop(NamedTuple):
    """A size of Mamba-2 and the batch that it is trained on."""

    name: str
    width: int
    num_layers: int
    rows: int = 8
    length: int = 2048
    num_tokens: int = 50277

    @property
    def shape(self) -> Shape:
        """The model's."""
        return Shape(width=self.width, num_layers=self.num_layers, num_tokens=self.num_tokens)


LOOPS = (Loop("130m", 768, 24), Loop("780m", 1536, 48))


def loop_cases(device: str, loops: tuple[Loop, ...] = LOOPS) -> Iterator[Row]:
    """Rows of each size with each backend that works on `device`, one after the other.

    The limit of a speed is the card's peak over the model's FLOPs, so its share is the MFU; None for a card that is not
    in `PEAKS`. Where a batch does not fit, its blocks compute their activations again in backward ("checkpointed").
    """
    peak = PEAKS.get(torch.cuda.get_device_name()) if device == "cuda" else None
    usable = [name for name, why in report(device).items() if not (why["ssd"] or why["causal_conv"])]
    for loop in loops:
        for backend in usable:
            with patch.dict(os.environ, SSMVL_BACKEND=backend):
                try:
                    rows = measure(loop, f"{loop.name}, {backend}", device, peak)
                except torch.OutOfMemoryError:
                    rows = None
                if rows is None:  # outside `except`, which would keep what did not fit
                    rows = measure(loop, f"{loop.name}, {backend}, checkpointed", device, peak, checkpointing=True)
            yield from rows


def measure(loop: Loop, case: str, device: str, peak: float | None, checkpointing: bool = False) -> list[Row]:
    """Time, MFU and, on a GPU, peak memory of one loop."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    shape = loop.shape
    model = build(shape, device)
    if checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(shape.num_tokens, (loop.rows, loop.length + 1), device=device)
    losses: list[Tensor] = []

    def train(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16):
                logits = model.head(model.backbone(model.embed(ids[:, :-1])))
                loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())

    def speed(what: str, tokens: int, spent: float, flops: float) -> Row:
        limit = None if peak is None else peak * 1e12 / flops
        return Row(f"{what} {case}", tokens / spent, "tok/s", limit, limit and tokens / spent / limit)

    tokens, forward = loop.rows * loop.length, token_operations(model, shape)
    seconds(lambda: train(WARM), device)
    rows = [speed("train", TIMED * tokens, seconds(lambda: train(TIMED), device), 3 * forward)]
    first, last = float(losses[0]), float(losses[-1])
    rows.append(Row(f"loss {case}", last, "nats", first, last / first))
    if device == "cuda":
        used, there = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        rows.append(Row(f"memory {case}", used / 1e6, "MB", there / 1e6, used / there))
    optimizer.zero_grad()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        read, written = _read_and_write(model, ids[:, :-1], device)
    prompt = speed("read", tokens, read, operations(model, shape))  # logits of the last position alone
    return [*rows, prompt, Row(f"write {case}", TIMED * loop.rows / written, "tok/s")]


def _read_and_write(model: MambaLM, ids: Tensor, device: str) -> tuple[float, float]:
    """Seconds of reading a prompt into a state, and of `TIMED` tokens decoded after it, each warm."""
    lengths = torch.full((len(ids),), ids.shape[1], device=device)
    state = model.new_state(len(ids))

    def read() -> None:
        nonlocal state
        state = model.new_state(len(ids))
        model.head(model.prefill(model.embed(ids), lengths, state)[:, -1])

    def write(steps: int) -> None:
        token = ids[:, -1]
        for _ in range(steps):
            token = model.head(model.step(model.embed(token), state)).argmax(-1)

    seconds(read, device)
    spent = seconds(read, device)
    seconds(lambda: write(WARM), device)
    return spent, seconds(lambda: write(TIMED), device)


def token_operations(model: MambaLM, shape: Shape) -> float:
    """FLOPs of one token's forward, its logits included."""
    return operations(model, shape) + 2 * model.embedding.weight.numel()
