"""Checkpoints as others write them, opened without reading their tensors: files are mapped, pickles refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmvl.checkpoints.files import INDEX_FILE, WEIGHTS_FILE, read_tensors
from ssmvl.errors import CheckpointError

TORCH_FILES = (".bin", ".pt", ".pth")
FIRST = (INDEX_FILE, WEIGHTS_FILE, "pytorch_model.bin.index.json", "pytorch_model.bin")  # of a folder, in this order


@dataclass(frozen=True)
class Foreign:
    """An opened checkpoint.

    Attributes:
        tensors: by the names in the file, nested mappings joined by dots; mapped, so that bytes are read when used.
        config: its `config.json`, empty where there is none.
        source: for messages.
    """

    tensors: dict[str, Tensor]
    config: Mapping[str, Any]
    source: str


def open_checkpoint(path: str | Path) -> Foreign:
    """Open a checkpoint file, or a folder that holds one, in one file or in shards.

    Args:
        path: `*.safetensors`, `*.bin`, `*.pt`, `*.pth`, an index of shards (`*.index.json`), or a folder.

    Raises:
        CheckpointError: nothing is there, a file is damaged or missing, or it holds more than tensors and would have
            to be unpickled.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in FIRST if (path / name).is_file()]
        found = found or [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", *TORCH_FILES)]
        if not found or (len(found) > 1 and found[0].name not in FIRST):
            what = f"several ({', '.join(p.name for p in found[:5])}); name one" if found else "none"
            raise CheckpointError(f"{path} must hold one checkpoint, such as {', '.join(FIRST)}; it holds {what}")
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    config = path.parent / "config.json"
    return Foreign(_tensors(path), read_json(config) if config.is_file() else {}, str(path))


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.name.endswith(".index.json"):
        return _shards(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if path.suffix in TORCH_FILES:
        return dict(_flat("", _unpickled_without_code(path)))
    allowed = ", ".join((".safetensors", *TORCH_FILES, ".index.json"))
    raise CheckpointError(f"{path}: a checkpoint ends in one of {allowed}")


def _shards(index: Path) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index}: has no mapping `weight_map` of tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} lies in another folder; shards lie beside their index")
        if name.endswith(".json"):
            raise CheckpointError(f"{index}: {name!r} is no file of tensors")
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index.parent / name}: missing, but {index.name} lists it; was it downloaded whole?"
            )
        inside = _tensors(index.parent / name)
        wrong = sorted(inside.keys() ^ {tensor for tensor, file in where.items() if file == name})
        if wrong:
            raise CheckpointError(f"{index.parent / name}: {index.name} disagrees about {', '.join(wrong[:5])}")
        tensors |= inside
    return tensors


def _unpickled_without_code(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise CheckpointError(
            f"{path}: holds more than tensors, and reading that could run any code, so it is refused "
            f"({reason.strip()[:200]}); save its tensors as safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint of torch ({str(error)[:200]})") from error


def _flat(prefix: str, node: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested mappings; numbers and texts beside them are left out."""
    if isinstance(node, Tensor):
        yield prefix, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), value)


def _float(node: dict[str, Any]) -> Any:
    """Newer versions of transformers write infinity as `{"__float__": "Infinity"}`."""
    return float(node["__float__"]) if node.keys() == {"__float__"} else node


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        CheckpointError: it does not.
    """
    try:
        found = json.loads(path.read_text(), object_hook=_float)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a mapping, found {type(found).__name__}")
    return found
