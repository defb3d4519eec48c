"""Checkpoints as others write them, opened without reading their tensors: files are mapped, pickles refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from ssmvl.checkpoints.files import SHARD_INDEX_FILE, WEIGHTS_FILE, check_digest, read_tensors
from ssmvl.checkpoints.hub import user_path
from ssmvl.errors import CheckpointError, short

TORCH_FILES = (".bin", ".pt", ".pth", ".ckpt")
WRAPPERS = ("module.", "_orig_mod.", "model.", "state_dict.")  # data parallel, torch.compile, and Lightning
OPEN_CLIP, OPEN_CLIP_CONFIG = "open_clip_", "open_clip_config.json"
POINTER = b"version https://git-lfs"
FIRST = (
    SHARD_INDEX_FILE,
    WEIGHTS_FILE,
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)  # of a folder, in this order


@dataclass(frozen=True)
class OpenedCheckpoint:
    """An opened checkpoint.

    Attributes:
        tensors: by the names in the file, nested mappings joined by dots; mapped, so that bytes are read when used.
        config: its `config.json`, empty where there is none.
        source: for messages.
    """

    tensors: dict[str, Tensor]
    config: Mapping[str, Any]
    source: str


def open_checkpoint(path: str | Path, *, verify: bool = True, unwrap: bool = False) -> OpenedCheckpoint:
    """Open a checkpoint file, or a folder that holds one, in one file or in shards.

    Args:
        path: `*.safetensors`, `*.bin`, `*.pt`, `*.pth`, `*.ckpt`, an index of shards (`*.index.json`), or a folder.
        verify: whether files are read once more, to compare them with the digests in a `SHA256SUMS` beside them.
        unwrap: whether prefixes that all names share because of a wrapper (`module.`, `_orig_mod.`, `model.`) are
            stripped, and of a file of Lightning only its `state_dict` is used.

    Raises:
        CheckpointError: nothing is there or more than one, a file is damaged or missing, a tensor in it cannot be
            read by its name, or it holds more than tensors and would have to be unpickled.
    """
    path = user_path(path)
    path = _of_folder(path) if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    config = path.with_name(OPEN_CLIP_CONFIG if path.name.startswith(OPEN_CLIP) else "config.json")
    tensors = _tensors(path, verify, unwrap)
    while unwrap and (prefix := wrapper_of(tensors)):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return OpenedCheckpoint(tensors, read_json(config) if config.is_file() else {}, str(path))


def wrapper_of(names: Collection[str]) -> str:
    """The wrapper prefix shared by all names, or an empty string."""
    return next((prefix for prefix in WRAPPERS if names and all(name.startswith(prefix) for name in names)), "")


def _of_folder(folder: Path) -> Path:
    """The first of the usual files in a folder, as in hubs that hold several; else its only file of tensors."""
    found = [folder / name for name in FIRST if (folder / name).is_file()][:1]
    found = found or [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", *TORCH_FILES)]
    if len(found) != 1:
        what = f"several ({', '.join(short(p.name) for p in found[:5])}); name one" if found else "none"
        raise CheckpointError(f"{folder} must hold one checkpoint, such as {', '.join(FIRST)}; it holds {what}")
    return found[0]


def _tensors(path: Path, verify: bool, unwrap: bool = False) -> dict[str, Tensor]:
    if path.name.endswith(".index.json"):
        return _shards(path, verify)
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise CheckpointError(f"{path}: is a pointer of git LFS, not the file itself; fetch that with git lfs pull")
    if verify:
        check_digest(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if path.suffix in TORCH_FILES:
        tree = _unpickled_without_code(path)
        lightning = unwrap and isinstance(tree, Mapping) and isinstance(tree.get("state_dict"), Mapping)
        return _by_name(path, tree["state_dict"] if lightning else tree)
    allowed = ", ".join((".safetensors", *TORCH_FILES, ".index.json"))
    raise CheckpointError(f"{path}: a checkpoint ends in one of {allowed}")


def _shards(index: Path, verify: bool) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index}: has no mapping `weight_map` of tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {short(name)!r} lies in another folder; shards lie beside their index")
        if name.endswith(".json"):
            raise CheckpointError(f"{index}: {short(name)!r} is no file of tensors")
        if not user_path(index.parent / name).is_file():
            raise CheckpointError(
                f"{index.parent / name}: missing, but {index.name} lists it; was it downloaded whole?"
            )
        inside = _tensors(index.parent / name, verify)
        wrong = sorted(inside.keys() ^ {tensor for tensor, file in where.items() if file == name})
        if wrong:
            raise CheckpointError(f"{index.parent / name}: {index.name} disagrees about {short(', '.join(wrong[:5]))}")
        tensors |= inside
    return tensors


def _unpickled_without_code(path: Path) -> Any:
    if not is_zipfile(path):
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint of torch, which is a zip file. Was it downloaded whole? One of a "
            "torch before 1.6 is written anew by torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise CheckpointError(
            f"{path}: holds more than tensors, and reading that could run any code, so it is refused "
            f"({reason.strip()[:200]}); save its tensors as safetensors"
        ) from error
    except Exception as error:  # damaged bytes may raise anything on their way through torch
        raise CheckpointError(f"{path}: cannot be read as a checkpoint of torch ({str(error)[:200]})") from error


def _by_name(path: Path, tree: Any) -> dict[str, Tensor]:
    """The tensors of nested mappings, by their keys joined by dots; numbers and texts beside them are left out."""
    found: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    try:
        for keys, tensor, listed in _leaves((), tree):
            name, place = ".".join(map(str, keys)), short(" > ".join(map(repr, keys)))
            if listed:
                raise CheckpointError(
                    f"{path}: holds a tensor in a list ({place}), without a name; save the mapping of the weights alone"
                )
            if name in found:
                both = f"{places[name]} and {place}"
                raise CheckpointError(f"{path}: has two tensors of one name, {both}; save each under its own")
            if tensor.layout is not torch.strided or tensor.is_meta:
                what = "on meta, without values" if tensor.is_meta else str(tensor.layout)
                raise CheckpointError(f"{path}: {short(name)} is {what}; save dense tensors with their values")
            found[name], places[name] = tensor, place
    except RecursionError as error:
        raise CheckpointError(f"{path}: holds itself, or mappings too deep in each other to be read") from error
    return found


def _leaves(keys: tuple[Any, ...], node: Any, listed: bool = False) -> Iterator[tuple[tuple[Any, ...], Tensor, bool]]:
    """Keys down to each tensor, the tensor, and whether it lies in a list."""
    if isinstance(node, Tensor):
        yield keys, node, listed
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves((*keys, key), value, listed)
    elif isinstance(node, list | tuple | set):
        for number, value in enumerate(node):
            yield from _leaves((*keys, number), value, True)


def _float(node: dict[str, Any]) -> Any:
    """Newer versions of transformers write infinity as `{"__float__": "Infinity"}`."""
    return float(str(node["__float__"])) if node.keys() == {"__float__"} else node


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        CheckpointError: it does not.
    """
    try:
        found = json.loads(path.read_text(), object_hook=_float)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({short(str(error))})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a mapping, found {type(found).__name__}")
    return found
