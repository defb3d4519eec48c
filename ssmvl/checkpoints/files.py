"""Read and write safetensors files and directories of them. Writes are atomic; pickles are not supported."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssmvl.errors import CheckpointError
from ssmvl.files import ABOUT_FILE, flush, written_whole

WEIGHTS_FILE, SHARD_INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DIGESTS_FILE = "SHA256SUMS"  # digests of a directory's tensor files, in the format that `sha256sum --check` reads
SHARD = 5 * 10**9  # maximum size of one file in bytes; the default of huggingface_hub
BYTES = "surrogateescape"  # error handler with which bytes that are not UTF-8 survive decoding and encoding


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with written_whole(Path(path)) as partial:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, partial, dict(metadata or {}))
        partial.chmod(0o644)  # safetensors creates files that only their owner can read


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: all tensors, on the CPU, and the metadata.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error


def check_digest(path: Path) -> None:
    """Check a file against its digest in its directory's `DIGESTS_FILE`, if there is one.

    Raises:
        CheckpointError: the digests differ or cannot be read, or a saved model's `DIGESTS_FILE` does not list the file.
    """
    digests_file = path.with_name(DIGESTS_FILE)
    try:
        lines = digests_file.read_text(errors="replace").splitlines() if digests_file.is_file() else []
        digests = {name.lstrip(" *"): digest for digest, _, name in (line.partition(" ") for line in lines)}
        damaged = path.name in digests and _digest(path) != digests[path.name].lower()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be checked against {digests_file} ({error})") from error
    saved_model = path.with_name(ABOUT_FILE).is_file() and digests_file.is_file()
    if saved_model and path.name not in digests:
        advice = "copy or download the directory again"
        raise CheckpointError(f"{digests_file} is damaged: it does not list {path.name}; {advice}")
    if damaged:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 digest does not match {DIGESTS_FILE}; copy or download it again (or "
            f"delete {DIGESTS_FILE} if you changed the file yourself)"
        )


def write_folder(folder: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write a directory of tensor and text files. An existing one is replaced once the new one is complete.

    Tensors of up to `SHARD` bytes in total are written to `WEIGHTS_FILE`. Larger models are split into several files,
    which `SHARD_INDEX_FILE` lists.
    `DIGESTS_FILE` contains the SHA-256 digest of each tensor file.

    Args:
        folder: the directory; it must contain only such files, or not exist.
        tensors: name -> tensor; a tensor with several names is written under the first.
        texts: file name -> content.

    Raises:
        CheckpointError: the directory contains other files, which would be lost.
    """
    folder = folder.resolve()
    others = sorted(p.name for p in folder.iterdir() if not _replaceable(p.name, texts)) if folder.exists() else []
    if others:
        shown = ", ".join(others[:5])
        raise CheckpointError(f"{folder} contains other files ({shown}); save the model to a separate directory")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{suffix}") for suffix in ("partial", "old"))
    try:
        partial.mkdir()
        _write_shards(partial, tensors)
        for name, text in texts.items():
            with written_whole(partial / name) as file:
                file.write_bytes(text.encode(errors=BYTES))
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        flush(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for path in (partial, old):
            shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replaceable(name: str, texts: Mapping[str, str]) -> bool:
    """Return True for the names of files that `write_folder` writes."""
    return (
        name in texts
        or name in (SHARD_INDEX_FILE, DIGESTS_FILE)
        or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) is not None
    )


def _write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    seen: set[object] = set()
    unique = {}
    for name, tensor in tensors.items():
        view = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if not tensor.numel() or view not in seen:
            unique[name] = tensor
        seen.add(view)
    split = split_torch_state_dict_into_shards(unique, max_shard_size=SHARD)
    for name, keys in split.filename_to_tensors.items():
        # transformers requires the metadata key `format`.
        write_tensors(folder / name, {key: unique[key] for key in keys}, {"format": "pt"})
    digests = "".join(f"{_digest(folder / name)}  {name}\n" for name in split.filename_to_tensors)
    with written_whole(folder / DIGESTS_FILE) as file:
        file.write_text(digests)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        with written_whole(folder / SHARD_INDEX_FILE) as file:
            file.write_text(json.dumps(index, indent=2) + "\n")
