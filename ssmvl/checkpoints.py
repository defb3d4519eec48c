"""Tensors in safetensors files: written whole or not at all, read strictly with a readable diff. No pickles."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ssmvl.errors import CheckpointError


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename it: a reader sees the old file or the new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, partial, dict(metadata or {}))
        partial.chmod(0o644)  # safetensors makes it private
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error


@torch.no_grad()
def load_into(module: nn.Module, path: str | Path) -> None:
    """Copy a safetensors file into a module, strictly: the same names and shapes, cast to the module's dtypes.

    Raises:
        CheckpointError: names or shapes differ; nothing was copied. Lists what is missing, surplus or misshapen.
    """
    found, _ = read_tensors(path)
    expected = module.state_dict()
    problems = [f"missing {name} {tuple(expected[name].shape)}" for name in expected.keys() - found.keys()]
    problems += [f"surplus {name} {tuple(found[name].shape)}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if expected[name].shape != found[name].shape:
            problems.append(f"{name} is {tuple(found[name].shape)}, the model has {tuple(expected[name].shape)}")
    if problems:
        shown = sorted(problems)[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CheckpointError(f"{path} does not fit the model:\n  " + "\n  ".join(shown))
    for name, tensor in expected.items():
        tensor.copy_(found[name])


def flush(path: Path) -> None:
    """Fsync a file or a folder, so that a rename after it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
