"""Tensors in safetensors files: written whole or not at all, read strictly with a readable diff. No pickles."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ssmvl.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name to write under; renamed to `path` at the end, so a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    with written_whole(Path(path)) as partial:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, partial, dict(metadata or {}))
        partial.chmod(0o644)  # safetensors makes it private


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


def write_folder(folder: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write a folder of one tensor file and some text files; an older such folder is replaced once this one is whole.

    Args:
        folder: holds nothing but such files, or does not exist.
        tensors: of `WEIGHTS_FILE`.
        texts: contents by file name.

    Raises:
        CheckpointError: the folder holds other files, which would be lost.
    """
    folder = folder.resolve()
    others = sorted({p.name for p in folder.iterdir()} - {WEIGHTS_FILE, *texts}) if folder.exists() else []
    if others:
        raise CheckpointError(f"{folder} holds other files ({', '.join(others[:5])}); save into a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("partial", "old"))
    try:
        partial.mkdir()
        write_tensors(partial / WEIGHTS_FILE, tensors)
        for name, text in texts.items():
            with written_whole(partial / name) as file:
                file.write_text(text)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _flush(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for path in (partial, old):
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    """Fsync a file or a folder, so that a rename after it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
