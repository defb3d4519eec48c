"""Checkpoints as a run writes them to be resumed, one file or shards: the model's tensors out of them, and no code run.

Composer writes them: of one device or DDP a file of torch, of FSDP2 a folder of torch.distributed.checkpoint. Both hold
pickles, with times and random states beside tensors. Here these are read as what they are made of.
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

METADATA_FILE = ".metadata"  # of shards
MODEL, SHARDED_MODEL = "model.", "state.model.model."  # prefixes of the model's tensors
RECORDS = {  # what torch.distributed.checkpoint's index is made of
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
    "builtins": {"getattr"},  # by which older Pythons pickle an enum's member
    "pathlib": {"PosixPath", "WindowsPath"},
}


def model_tensors(path: Path, trust_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of the model that was trained, by its own names, on the CPU; the optimizer's are not read.

    Args:
        path: a file, which is mapped, or a folder of shards.
        trust_pickle: see `read_index`; a file needs no trust.

    Raises:
        CheckpointError: it cannot be read, is damaged, holds no such model, or its index is refused.
    """
    try:
        found = _of_shards(path, read_index(path, trust_pickle)) if path.is_dir() else _of_file(path)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes may raise anything on their way through torch
        lines = str(error).splitlines()
        why = next((line for line in lines if "GLOBAL" in line), str(error))  # torch's advice is to run the pickle
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {short(why)})") from error
    if not found:
        raise CheckpointError(
            f"{path} holds no model that a run trained; a checkpoint of a run has it under state > model. "
            "Weights of others need no export: ssmvl.load(WEIGHTS, recipe=NAME)"
        )
    return found


def weights_problem(path: Path) -> str:
    """Return which of the model's weights in a complete checkpoint are not finite, or an empty string.

    Shards are read part by part, so that no more than one part is in memory.

    Raises:
        CheckpointError: see `model_tensors`.
    """
    found: Iterable[tuple[str, Tensor]]
    if path.is_dir():
        parts = read_index(path).storage_data.items()
        named = ((key.fqn, place) for key, place in parts if key.fqn.startswith(SHARDED_MODEL))
        found = ((name.removeprefix(SHARDED_MODEL), _part(path, place)) for name, place in named)
    else:
        found = model_tensors(path).items()
    wrong = list(dict.fromkeys(name for name, tensor in found if not tensor.isfinite().all()))
    what = short(", ".join(wrong[:5])) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    return f"holds weights that are not finite: {what}" if wrong else ""


def read_index(folder: Path, trust_pickle: bool = False) -> Any:
    """What the shards of a folder hold and where: torch's `Metadata`, or records with its attributes.

    Args:
        folder: of torch.distributed.checkpoint.
        trust_pickle: whether the index, which is a pickle, is read as one whatever it holds: that may run any code.

    Raises:
        CheckpointError: the index holds more than names, sizes and places, and is not trusted.
        Exception: whatever a damaged pickle raises.
    """
    if trust_pickle:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        return FileSystemReader(folder).read_metadata()
    with (folder / METADATA_FILE).open("rb") as file:
        return _IndexReader(file, folder).load()


class _Record:
    """Stands for an object of an index: it keeps the attributes that it was saved with, and does nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _IndexReader(pickle.Unpickler):
    """Reads an index into records: a pickle can call nothing but what `find_class` gives."""

    def __init__(self, file: io.BufferedReader, folder: Path) -> None:
        super().__init__(file)
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name in RECORDS.get(module, ()):
            return _Record
        raise CheckpointError(
            f"{self._folder / METADATA_FILE} is a pickle that holds more than names, sizes and places of tensors "
            f"({short(f'{module}.{name}')}), and reading that can run any code, so it is refused; if you trust whoever "
            "wrote it, --trust-pickle reads it (in Python trust_pickle=True)"
        )


def _of_shards(folder: Path, index: Any) -> dict[str, Tensor]:
    """Put together from the shards' parts.

    Not by torch's own reader: it unpickles freely whatever the index calls bytes.
    """
    sizes = {
        name: torch.Size(entry.size)
        for name, entry in index.state_dict_metadata.items()
        if name.startswith(SHARDED_MODEL) and hasattr(entry, "size")
    }
    found: dict[str, Tensor] = {}
    filled: Counter[str] = Counter()
    for key, place in index.storage_data.items():
        if key.fqn in sizes:
            part = _part(folder, place)
            if key.fqn not in found:
                found[key.fqn] = torch.empty(sizes[key.fqn], dtype=part.dtype)
            spans = zip(key.offset, part.shape, strict=True)
            window = found[key.fqn][tuple(slice(start, start + count) for start, count in spans)]
            if window.shape != part.shape:
                raise CheckpointError(f"{folder}: a part of {short(key.fqn)} lies outside of it; the index is damaged")
            window.copy_(part)
            filled[key.fqn] += part.numel()
    lacking = sorted(name for name, size in sizes.items() if filled[name] != size.numel())
    if lacking:
        raise CheckpointError(f"{folder}: its index names no whole {short(', '.join(lacking[:5]))}")
    return {name.removeprefix(SHARDED_MODEL): tensor for name, tensor in found.items()}


def _part(folder: Path, place: Any) -> Tensor:
    name = str(place.relative_path)
    if Path(name).name != name:
        raise CheckpointError(f"{folder}: {short(name)!r} lies in another folder; shards lie beside their index")
    with (folder / name).open("rb") as file:
        file.seek(place.offset)
        part: Tensor = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
    return part


class _Ignored:
    """Stands for what a file holds beside tensors and plain values; it keeps nothing and does nothing."""

    def __new__(cls, *args: object) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


def _of_file(path: Path) -> dict[str, Tensor]:
    others = [name.rpartition(".") for name in get_unsafe_globals_in_checkpoint(str(path))]
    # torch takes a class of that name in place of what the file names
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
