"""Limits of the machine: its rate of matrix products at the model's own shapes, and its rate of reading memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

CHUNK = 64  # positions per chunk, assumed when counting the SSD's own matrix products


class Shape(NamedTuple):
    """Sizes of a Mamba-2 language model and of its inputs; the default model is mamba2-130m."""

    width: int = 768
    num_layers: int = 24
    num_tokens: int = 50277
    d_state: int = 128
    head_dim: int = 64
    prompt: int = 1024  # tokens of a prefill
    longest: int = 16384  # tokens of the longest prefill
    rows: int = 4  # rows of the training step
    row_length: int = 512
    answer: int = 32  # supervised tokens per row
    patches: int = 729  # positions of a scan: a grid of 27 x 27

    @property
    def inner(self) -> int:
        """E."""
        return 2 * self.width

    @property
    def heads(self) -> int:
        """H."""
        return self.inner // self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: x, B, C."""
        return self.inner + 2 * self.d_state

    @property
    def products(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(inputs, outputs) of in_proj and out_proj."""
        return (self.width, self.inner + self.channels + self.heads), (self.inner, self.width)


def ssd_operations(shape: Shape) -> int:
    """FLOPs of the SSD's matrix products per token, summed over all layers."""
    P, S, H = shape.head_dim, shape.d_state, shape.heads
    return shape.num_layers * (2 * CHUNK * S + H * (2 * CHUNK * P + 4 * P * S))


def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, including its work on the GPU."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(shape: Shape, tokens: int, device: str) -> float:
    """FLOP/s of the matrix products of in_proj and out_proj, each the fastest of six calls."""
    pairs = [(torch.randn(tokens, i, device=device), torch.randn(o, i, device=device)) for i, o in shape.products]
    elapsed = sum(min(seconds(partial(F.linear, x, w), device) for _ in range(6)) for x, w in pairs)
    return 2 * tokens * sum(w.numel() for _, w in pairs) / elapsed


def read_rate(device: str) -> float:
    """Bytes per second at which a sum reads 512 MiB, the fastest of six calls."""
    block = torch.ones(2**27, device=device)
    return block.nbytes / min(seconds(block.sum, device) for _ in range(6))


def machine(device: str) -> dict[str, str | int]:
    """Hardware and software of the measurement."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    backend = os.environ.get("SSMVL_BACKEND") or "auto"
    return {"device": name, "threads": torch.get_num_threads(), **versions, "backend": backend}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
