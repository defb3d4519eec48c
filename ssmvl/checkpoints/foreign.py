"""Third-party checkpoints, opened without reading their tensors: files are memory-mapped, pickled objects rejected."""

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
# Usual checkpoints in a directory; the first that exists is used.
FIRST = (SHARD_INDEX_FILE, WEIGHTS_FILE, "pytorch_model.bin.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class OpenedCheckpoint:
    """Checkpoint whose tensors are memory-mapped: their bytes are read on first use.

    Attributes:
        tensors: by their names in the file; the keys of nested mappings are joined by dots.
        config: contents of its `config.json`, empty if there is none.
        source: path of the file, for messages.
    """

    tensors: dict[str, Tensor]
    config: Mapping[str, Any]
    source: str


def open_checkpoint(path: str | Path, *, verify: bool = True, unwrap: bool = False) -> OpenedCheckpoint:
    """Open a checkpoint: a file, sharded files with an index, or a directory that contains either.

    Args:
        path: `*.safetensors`, `*.bin`, `*.pt`, `*.pth`, `*.ckpt`, an index of shards (`*.index.json`) or a directory.
        verify: compare files with the digests in their directory's `SHA256SUMS`, which reads each file one more time.
        unwrap: strip a wrapper's prefix that all names share (`module.`, `_orig_mod.`, `model.`), and use only the
            `state_dict` of a Lightning checkpoint.

    Raises:
        CheckpointError: the path contains no checkpoint or several, a file is damaged or missing, a tensor has no
            unique name, or the file contains objects other than tensors and would have to be unpickled.
    """
    path = user_path(path)
    path = _find_in_folder(path) if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    config = path.with_name(OPEN_CLIP_CONFIG if path.name.startswith(OPEN_CLIP) else "config.json")
    tensors = _tensors(path, verify, unwrap)
    while unwrap and (prefix := wrapper_of(tensors)):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return OpenedCheckpoint(tensors, read_json(config) if config.is_file() else {}, str(path))


def wrapper_of(names: Collection[str]) -> str:
    """Return the wrapper's prefix that all names share, or an empty string."""
    return next((prefix for prefix in WRAPPERS if names and all(name.startswith(prefix) for name in names)), "")


def _find_in_folder(folder: Path) -> Path:
    """Return the first of the usual files in a directory (Hub models may have several), else its only tensor file."""
    files = [folder / name for name in FIRST if (folder / name).is_file()][:1]
    files = files or [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", *TORCH_FILES)]
    if len(files) != 1:
        shown = f"several ({', '.join(short(p.name) for p in files[:5])}); name one" if files else "none"
        raise CheckpointError(f"{folder} must contain one checkpoint, such as {', '.join(FIRST)}; it contains {shown}")
    return files[0]


def _tensors(path: Path, verify: bool, unwrap: bool = False) -> dict[str, Tensor]:
    if path.name.endswith(".index.json"):
        return _shards(path, verify)
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise CheckpointError(f"{path}: is a Git LFS pointer; run git lfs pull to fetch the file")
    if verify:
        check_digest(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if path.suffix in TORCH_FILES:
        tree = _load_without_code(path)
        lightning = unwrap and isinstance(tree, Mapping) and isinstance(tree.get("state_dict"), Mapping)
        return _by_name(path, tree["state_dict"] if lightning else tree)
    allowed = ", ".join((".safetensors", *TORCH_FILES, ".index.json"))
    raise CheckpointError(f"{path}: the name of a checkpoint file must end in one of {allowed}")


def _shards(index: Path, verify: bool) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: has no mapping `weight_map` from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            message = f"{short(name)!r} is in another directory; shards must be next to their index"
            raise CheckpointError(f"{index}: {message}")
        if name.endswith(".json"):
            raise CheckpointError(f"{index}: {short(name)!r} is not a tensor file")
        if not user_path(index.parent / name).is_file():
            raise CheckpointError(
                f"{index.parent / name}: missing, but {index.name} lists it; is the download complete?"
            )
        shard = _tensors(index.parent / name, verify)
        wrong = sorted(shard.keys() ^ {tensor for tensor, file in weight_map.items() if file == name})
        if wrong:
            shown = short(", ".join(wrong[:5]))
            raise CheckpointError(f"{index.parent / name}: its tensors do not match {index.name}: {shown}")
        tensors |= shard
    return tensors


def _load_without_code(path: Path) -> Any:
    if not is_zipfile(path):
        raise CheckpointError(
            f"{path}: cannot be read as a torch checkpoint, which is a zip file; is the download complete? Convert a "
            "file of torch before 1.6 with torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise CheckpointError(
            f"{path}: contains more than tensors, and reading that could execute any code, so it is rejected "
            f"({reason.strip()[:200]}); save its tensors as safetensors"
        ) from error
    except Exception as error:  # torch may raise anything on damaged bytes
        raise CheckpointError(f"{path}: cannot be read as a torch checkpoint ({str(error)[:200]})") from error


def _by_name(path: Path, tree: Any) -> dict[str, Tensor]:
    """Collect the tensors of nested mappings, their keys joined by dots. Leaves that are not tensors are ignored."""
    tensors: dict[str, Tensor] = {}
    key_paths: dict[str, str] = {}
    try:
        for keys, tensor, in_list in _leaves((), tree):
            name, key_path = ".".join(map(str, keys)), short(" > ".join(map(repr, keys)))
            if in_list:
                advice = "save only the mapping of weights"
                raise CheckpointError(f"{path}: contains a tensor in a list ({key_path}), without a name; {advice}")
            if name in tensors:
                both = f"{key_paths[name]} and {key_path}"
                raise CheckpointError(f"{path}: has two tensors of one name, {both}; give each its own name")
            if tensor.layout is not torch.strided or tensor.is_meta:
                kind = "on meta, without values" if tensor.is_meta else str(tensor.layout)
                raise CheckpointError(f"{path}: {short(name)} is {kind}; save dense tensors with their values")
            tensors[name], key_paths[name] = tensor, key_path
    except RecursionError as error:
        raise CheckpointError(f"{path}: is cyclic or nested too deeply") from error
    return tensors


def _leaves(keys: tuple[Any, ...], node: Any, in_list: bool = False) -> Iterator[tuple[tuple[Any, ...], Tensor, bool]]:
    """Yield the keys that lead to each tensor, the tensor, and whether it is inside a list."""
    if isinstance(node, Tensor):
        yield keys, node, in_list
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves((*keys, key), value, in_list)
    elif isinstance(node, list | tuple | set):
        for number, value in enumerate(node):
            yield from _leaves((*keys, number), value, True)


def _float(node: dict[str, Any]) -> Any:
    """Convert `{"__float__": "Infinity"}`, as newer versions of transformers write infinity."""
    return float(str(node["__float__"])) if node.keys() == {"__float__"} else node


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains a mapping.

    Raises:
        CheckpointError: the file cannot be read or contains anything else.
    """
    try:
        data = json.loads(path.read_text(), object_hook=_float)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({short(str(error))})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a mapping, received {type(data).__name__}")
    return data
