"""Safetensors files and folders of them: written whole or not at all. No pickles."""

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
DIGESTS_FILE = "SHA256SUMS"  # of the files of tensors in a folder, as `sha256sum --check` reads it
SHARD = 5 * 10**9  # bytes of one file, as hubs prefer
BYTES = "surrogateescape"  # text read so is written as the bytes it was


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


def check_digest(path: Path) -> None:
    """Compare a file with its digest in the `DIGESTS_FILE` beside it, where there is one.

    Raises:
        CheckpointError: they differ, or the digests cannot be read; names the file.
    """
    listed = path.with_name(DIGESTS_FILE)
    try:
        lines = listed.read_text(errors="replace").splitlines() if listed.is_file() else []
        digests = {name.lstrip(" *"): digest for digest, _, name in (line.partition(" ") for line in lines)}
        damaged = path.name in digests and _digest(path) != digests[path.name].lower()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be compared with {listed} ({error})") from error
    ours = path.with_name(ABOUT_FILE).is_file() and listed.is_file()
    if ours and path.name not in digests:
        raise CheckpointError(f"{listed}: is damaged, it does not list {path.name}; copy or download the folder again")
    if damaged:
        raise CheckpointError(
            f"{path}: is damaged, its SHA-256 digest is not the one in {DIGESTS_FILE}; copy or download it again (or "
            f"delete {DIGESTS_FILE}, if you changed the file yourself)"
        )


def write_folder(folder: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write a folder of tensor files and text files; an older such folder is replaced once this one is whole.

    Up to `SHARD` bytes of tensors lie in `WEIGHTS_FILE`; more in several files, which `SHARD_INDEX_FILE` lists.
    `DIGESTS_FILE` has the SHA-256 digest of each.

    Args:
        folder: holds nothing but such files, or does not exist.
        tensors: by name; one that has two names is written under the first.
        texts: contents by file name.

    Raises:
        CheckpointError: the folder holds other files, which would be lost.
    """
    folder = folder.resolve()
    others = sorted(p.name for p in folder.iterdir() if not _ours(p.name, texts)) if folder.exists() else []
    if others:
        raise CheckpointError(f"{folder} holds other files ({', '.join(others[:5])}); save into a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("partial", "old"))
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


def _ours(name: str, texts: Mapping[str, str]) -> bool:
    return (
        name in texts
        or name in (SHARD_INDEX_FILE, DIGESTS_FILE)
        or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) is not None
    )


def _write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    seen: set[object] = set()
    kept = {}
    for name, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if not tensor.numel() or place not in seen:
            kept[name] = tensor
        seen.add(place)
    split = split_torch_state_dict_into_shards(kept, max_shard_size=SHARD)
    for name, inside in split.filename_to_tensors.items():
        write_tensors(folder / name, {key: kept[key] for key in inside}, {"format": "pt"})  # transformers wants it
    digests = "".join(f"{_digest(folder / name)}  {name}\n" for name in split.filename_to_tensors)
    with written_whole(folder / DIGESTS_FILE) as file:
        file.write_text(digests)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        with written_whole(folder / SHARD_INDEX_FILE) as file:
            file.write_text(json.dumps(index, indent=2) + "\n")
