"""Memory of a training step: the activations saved for backward, and the peak of a fresh process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from ssmvl.benchmarks.limits import CHUNK, Shape
from ssmvl.language.mamba_lm import MambaLM
from ssmvl.layers.mamba2 import Mamba2Mixer

SLACK = 1.3  # factor on the activations, for the gradients and buffers of the block in progress


def activations(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each fp32 tensor that forward must save for backward: those of all blocks, then of the model."""
    rows, length, width, inner, heads = shape.rows, shape.row_length, shape.width, shape.inner, shape.heads
    chunks, answers = -(-length // CHUNK), rows * shape.answer
    blocks = shape.num_layers
    return {
        "the residual, for the norm": (blocks, rows, length, width),
        "the normed residual, for in_proj": (blocks, rows, length, width),
        "z, x, B, C and dt before the convolution": (blocks, rows, length, shape.products[0][1]),
        "x, B and C after it, for the SSD": (blocks, rows, length, shape.channels),
        "dt + bias, the step sizes and their log decays": (blocks, 3, rows, length, heads),
        "the state that enters each chunk but the first": (
            blocks,
            chunks - 1,
            rows,
            heads,
            shape.head_dim,
            shape.d_state,
        ),
        "y, for the gated norm": (blocks, rows, length, inner),
        "the gated norm's result, for out_proj": (blocks, rows, length, inner),
        "the residual after the last block": (rows, length, width),
        "the normed residual, for the head": (rows, length, width),
        "log-softmax of the supervised tokens": (answers, shape.num_tokens),
    }


def activation_bytes(shape: Shape) -> int:
    """Bytes of all tensors of `activations`."""
    return sum(4 * torch.Size(size).numel() for size in activations(shape).values())


def build(shape: Shape, device: str) -> MambaLM:
    """Build the language model of `shape`."""
    mixer = partial(Mamba2Mixer, d_state=shape.d_state, head_dim=shape.head_dim)
    torch.manual_seed(0)
    with torch.device(device):
        return MambaLM(width=shape.width, num_layers=shape.num_layers, num_tokens=shape.num_tokens, mixer=mixer)


def train(model: MambaLM, shape: Shape, device: str) -> None:
    """Run forward and backward over a batch whose rows end with `answer` supervised tokens."""
    ids = torch.randint(shape.num_tokens, (shape.rows, shape.row_length), device=device)
    hidden = model.backbone(model.embed(ids))[:, -shape.answer - 1 : -1]
    F.cross_entropy(model.head(hidden.flatten(0, 1)), ids[:, -shape.answer :].flatten()).backward()


def peak(shape: Shape, device: str) -> int:
    """Peak memory in bytes of the model and two training steps, without an optimizer."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _two_steps(shape, device)
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, "-m", __name__, json.dumps(shape)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _status(field: str) -> int:
    """Bytes of VmRSS (current memory) or VmHWM (peak memory) in Linux. `getrusage` starts from the parent's peak."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(match[1]) if match else 0


def _two_steps(shape: Shape, device: str) -> None:
    model = build(shape, device)
    for _ in range(2):
        train(model, shape, device)
        model.zero_grad()


if __name__ == "__main__":  # run as a separate process, because the system counts peak memory per process
    shape = Shape(*json.loads(sys.argv[1]))
    _two_steps(shape._replace(width=128, num_layers=1, num_tokens=512), "cpu")  # threads, libraries, buffers
    before = _status("VmRSS")
    _two_steps(shape, "cpu")
    print(_status("VmHWM") - before)
