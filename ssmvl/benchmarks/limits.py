"""What the machine allows: its matrix-product rate at the model's own shapes, its rate of reading memory."""

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

CHUNK = 64  # positions of a chunk in the count of the SSD's own products


class Shape(NamedTuple):
    """A Mamba-2 language model and what it is run on; the defaults are mamba2-130m."""

    width: int = 768
    num_layers: int = 24
    num_tokens: int = 50277
    d_state: int = 128
    head_dim: int = 64
    prompt: int = 1024  # tokens of a prefill
    longest: int = 16384  # tokens of the longest one
    rows: int = 4  # of the training step
    row_length: int = 512
    answer: int = 32  # supervised tokens of each of its rows
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
        """Of the convolution: x, B, C."""
        return self.inner + 2 * self.d_state

    @property
    def products(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(inputs, outputs) of in_proj and out_proj."""
        return (self.width, self.inner + self.channels + self.heads), (self.inner, self.width)


def ssd_operations(shape: Shape) -> int:
    """Operations of one token's share of the SSD's matrix products, all layers together."""
    P, S, H = shape.head_dim, shape.d_state, shape.heads
    return shape.num_layers * (2 * CHUNK * S + H * (2 * CHUNK * P + 4 * P * S))


def seconds(run: Callable[[], object], device: str) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(shape: Shape, tokens: int, device: str) -> float:
    """Operations a second of in_proj's and out_proj's products, each at its fastest of five calls."""
    pairs = [(torch.randn(tokens, i, device=device), torch.randn(o, i, device=device)) for i, o in shape.products]
    spent = sum(min(seconds(partial(F.linear, x, w), device) for _ in range(6)) for x, w in pairs)
    return 2 * tokens * sum(w.numel() for _, w in pairs) / spent


def read_rate(device: str) -> float:
    """Bytes a second at which a sum reads half a gibibyte, the fastest of five."""
    block = torch.ones(2**27, device=device)
    return block.nbytes / min(seconds(block.sum, device) for _ in range(6))


def machine(device: str) -> dict[str, str | int]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    backend = os.environ.get("SSMVL_BACKEND") or "auto"
    return {"device": name, "threads": torch.get_num_threads(), **versions, "backend": backend}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
