"""Read the model's tensors from Composer's checkpoints, one file or shards, without executing code from them.

Composer writes a torch file on one device or with DDP, and a torch.distributed.checkpoint directory with FSDP2. Both
contain pickles, which hold timestamps and random states besides tensors. This module unpickles tensors and plain
values only; other objects are rejected or replaced by placeholders.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ssmvl.errors import CheckpointError, short

METADATA_FILE = ".metadata"  # index of a sharded checkpoint
MODEL, SHARDED_MODEL = "model.", "state.model.model."  # prefixes of the model's tensors
RECORDS = {  # types in the index of torch.distributed.checkpoint
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "builtins": {"getattr"},  # older Pythons pickle enum members with it
    "pathlib": {"PosixPath", "WindowsPath"},
}


def model_tensors(path: Path, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Return the trained model's tensors, by the model's own names, on the CPU. The optimizer's are not read.

    Args:
        path: a file, which is memory-mapped, or a directory of shards.
        trust_pickle: see `read_index`; not needed for a file.

    Raises:
        CheckpointError: the checkpoint is unreadable or damaged, holds no trained model, or has a rejected index.
    """
    try:
        tensors = _from_shards(path, read_index(path, trust_pickle)) if path.is_dir() else _from_file(path)
    except CheckpointError:
        raise
    except Exception as error:  # torch may raise any error for damaged bytes
        lines = str(error).splitlines()
        why = next((line for line in lines if "GLOBAL" in line), str(error))  # the rest advises running the pickle
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {short(why)})") from error
    if not tensors:
        raise CheckpointError(
            f"{path} holds no model of a training run, which would be under state > model. "
            "Third-party weights need no export; load them with ssmvl.load(WEIGHTS, recipe=NAME)"
        )
    return tensors


def weights_problem(path: Path) -> str:
    """Return a message that names the model's non-finite weights in a complete checkpoint, or an empty string.

    Shards are read part by part, so that only one part is in memory at a time.

    Raises:
        CheckpointError: see `model_tensors`.
    """
    tensors: Iterable[tuple[str, Tensor]]
    if path.is_dir():
        parts = read_index(path).storage_data.items()
        named = ((key.fqn, entry) for key, entry in parts if key.fqn.startswith(SHARDED_MODEL))
        tensors = ((name.removeprefix(SHARDED_MODEL), _part(path, entry)) for name, entry in named)
    else:
        tensors = model_tensors(path).items()
    names = list(dict.fromkeys(name for name, tensor in tensors if not tensor.isfinite().all()))
    shown = short(", ".join(names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"holds weights that are not finite: {shown}" if names else ""


def read_index(folder: Path, trust_pickle: bool = False) -> Any:
    """Read the index of a sharded checkpoint: torch's `Metadata`, or records with its attributes.

    Args:
        folder: directory written by torch.distributed.checkpoint.
        trust_pickle: if True, the index is unpickled without restrictions, which can execute arbitrary code.

    Raises:
        CheckpointError: the index holds more than names, sizes and offsets, and is not trusted.
        Exception: any error that a damaged pickle raises.
    """
    if trust_pickle:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        return FileSystemReader(folder).read_metadata()
    with (folder / METADATA_FILE).open("rb") as file:
        return _IndexReader(file, folder).load()


class _Record:
    """Placeholder for an object in an index: keeps the saved attributes and does nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _IndexReader(pickle.Unpickler):
    """Unpickles an index into records. The pickle can only call what `find_class` returns."""

    def __init__(self, file: io.BufferedReader, folder: Path) -> None:
        super().__init__(file)
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name in RECORDS.get(module, ()):
            return _Record
        raise CheckpointError(
            f"{self._folder / METADATA_FILE} is a pickle that holds more than names, sizes and offsets of tensors "
            f"({short(f'{module}.{name}')}). Reading it can execute arbitrary code, so it is rejected; if you trust "
            "its author, pass --trust-pickle (in Python trust_pickle=True)"
        )


def _from_shards(folder: Path, index: Any) -> dict[str, Tensor]:
    """Assemble the model's tensors from the parts in the shards.

    Torch's own reader is not used, because it unpickles everything that the index declares as bytes.
    """
    sizes = {
        name: torch.Size(entry.size)
        for name, entry in index.state_dict_metadata.items()
        if name.startswith(SHARDED_MODEL) and hasattr(entry, "size")
    }
    tensors: dict[str, Tensor] = {}
    filled: Counter[str] = Counter()
    for key, entry in index.storage_data.items():
        if key.fqn in sizes:
            part = _part(folder, entry)
            if key.fqn not in tensors:
                tensors[key.fqn] = torch.empty(sizes[key.fqn], dtype=part.dtype)
            spans = zip(key.offset, part.shape, strict=True)
            window = tensors[key.fqn][tuple(slice(start, start + count) for start, count in spans)]
            if window.shape != part.shape:
                raise CheckpointError(f"{folder}: a part of {short(key.fqn)} is out of bounds; the index is damaged")
            window.copy_(part)
            filled[key.fqn] += part.numel()
    incomplete = sorted(name for name, size in sizes.items() if filled[name] != size.numel())
    if incomplete:
        raise CheckpointError(f"{folder}: the index does not list all parts of {short(', '.join(incomplete[:5]))}")
    return {name.removeprefix(SHARDED_MODEL): tensor for name, tensor in tensors.items()}


def _part(folder: Path, entry: Any) -> Tensor:
    name = str(entry.relative_path)
    if Path(name).name != name:
        raise CheckpointError(f"{folder}: {short(name)!r} is in another directory; shards must be next to their index")
    with (folder / name).open("rb") as file:
        file.seek(entry.offset)
        part: Tensor = torch.load(io.BytesIO(file.read(entry.length)), map_location="cpu", weights_only=True)
    return part


class _Ignored:
    """Placeholder for objects in a file other than tensors and plain values: keeps nothing and does nothing."""

    def __new__(cls, *args: object) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


def _from_file(path: Path) -> dict[str, Tensor]:
    others = [name.rpartition(".") for name in get_unsafe_globals_in_checkpoint(str(path))]
    # torch uses these classes in place of those that the file names
    with safe_globals([type(name, (_Ignored,), {"__module__": module}) for module, _, name in others]):
        tree = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    for key in ("state", "model"):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    named = tree.items() if isinstance(tree, Mapping) else ()
    return {
        str(name).removeprefix(MODEL): value
        for name, value in named
        if isinstance(value, Tensor) and str(name).startswith(MODEL)
    }
