"""Speed of a language model in bf16 autocast, without Composer or data: AdamW training, prefill and decoding."""

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

# Peak TFLOP/s of dense bf16 matrix products from the vendors' data sheets, by CUDA device name.
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
WARMUP, TIMED = 3, 10  # steps


class Loop(NamedTuple):
    """A Mamba-2 size and its training batch."""

    name: str
    width: int
    num_layers: int
    rows: int = 8
    length: int = 2048
    num_tokens: int = 50277

    @property
    def shape(self) -> Shape:
        """Shape of the model."""
        return Shape(width=self.width, num_layers=self.num_layers, num_tokens=self.num_tokens)


LOOPS = (Loop("130m", 768, 24), Loop("780m", 1536, 48))


def loop_cases(device: str, loops: tuple[Loop, ...] = LOOPS) -> Iterator[Row]:
    """Yield the rows of each size with each backend that works on `device`.

    The limit of a speed is the GPU's peak divided by the model's FLOPs per token, so its share is the MFU; None for a
    GPU that is not in `PEAKS`. A batch that does not fit is run with activation checkpointing ("checkpointed").
    """
    peak = PEAKS.get(torch.cuda.get_device_name()) if device == "cuda" else None
    usable = [name for name, reasons in report(device).items() if not (reasons["ssd"] or reasons["causal_conv"])]
    for loop in loops:
        for backend in usable:
            with patch.dict(os.environ, SSMVL_BACKEND=backend):
                try:
                    rows = measure(loop, f"{loop.name}, {backend}", device, peak)
                except torch.OutOfMemoryError:
                    rows = None
                if rows is None:  # outside `except`, which would keep the failed run's memory
                    rows = measure(loop, f"{loop.name}, {backend}, checkpointed", device, peak, checkpointing=True)
            yield from rows


def measure(loop: Loop, case: str, device: str, peak: float | None, checkpointing: bool = False) -> list[Row]:
    """Measure the speed, MFU and loss of one loop and, on a GPU, its peak memory."""
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

    def speed(action: str, tokens: int, elapsed: float, flops: float) -> Row:
        limit = None if peak is None else peak * 1e12 / flops
        return Row(f"{action} {case}", tokens / elapsed, "tok/s", limit, limit and tokens / elapsed / limit)

    tokens, forward = loop.rows * loop.length, token_operations(model, shape)
    seconds(lambda: train(WARMUP), device)
    rows = [speed("train", TIMED * tokens, seconds(lambda: train(TIMED), device), 3 * forward)]
    first, last = float(losses[0]), float(losses[-1])
    rows.append(Row(f"loss {case}", last, "nats", first, last / first))
    if device == "cuda":
        used, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        rows.append(Row(f"memory {case}", used / 1e6, "MB", total / 1e6, used / total))
    optimizer.zero_grad()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        prefill, decode = _prefill_and_decode(model, ids[:, :-1], device)
    prompt = speed("read", tokens, prefill, operations(model, shape))  # logits of the last position only
    return [*rows, prompt, Row(f"write {case}", TIMED * loop.rows / decode, "tok/s")]


def _prefill_and_decode(model: MambaLM, ids: Tensor, device: str) -> tuple[float, float]:
    """Seconds to prefill a prompt, and to decode `TIMED` tokens after it; both after a warm-up."""
    lengths = torch.full((len(ids),), ids.shape[1], device=device)
    state = model.new_state(len(ids))

    def prefill() -> None:
        nonlocal state
        state = model.new_state(len(ids))
        model.head(model.prefill(model.embed(ids), lengths, state)[:, -1])

    def decode(steps: int) -> None:
        token = ids[:, -1]
        for _ in range(steps):
            token = model.head(model.step(model.embed(token), state)).argmax(-1)

    seconds(prefill, device)
    elapsed = seconds(prefill, device)
    seconds(lambda: decode(WARMUP), device)
    return elapsed, seconds(lambda: decode(TIMED), device)


def token_operations(model: MambaLM, shape: Shape) -> float:
    """FLOPs of the forward pass per token, including the logits."""
    return operations(model, shape) + 2 * model.embedding.weight.numel()
