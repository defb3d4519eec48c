"""Which checkpoints of a folder are whole, which of them is the newest, and which are old. Imports no Composer."""

from __future__ import annotations

import re
import zipfile
from itertools import islice
from pathlib import Path

from ssmvl.errors import short
from ssmvl.training.checkpoints.composer_files import read_index, weights_problem

CHECKPOINT = re.compile(r"ep\d+-ba(\d+)(-rank0\.pt)?")  # of one device or DDP a file, sharded a folder


def newest_whole(folder: Path, trust_pickle: bool = False, finite: bool = False) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of a folder that is whole, or None, and what is wrong with each newer one.

    Args:
        folder: of a stage's checkpoints.
        trust_pickle: see `ssmvl.training.checkpoints.composer_files.read_index`.
        finite: read its weights, and pass over a checkpoint in which one is not finite or has changed on the disk.
    """
    passed: dict[Path, str] = {}
    for path in _newest_first(folder):
        why = damage(path, trust_pickle) or (_weights_damage(path) if finite else "")
        if not why:
            return path, passed
        passed[path] = f"{path} {why}"
    return None, passed


def surplus(folder: Path, kept: int) -> list[Path]:
    """The checkpoints of a folder, damaged ones too, that are older than the newest `kept` whole ones."""
    found = _newest_first(folder)
    whole = (place for place, path in enumerate(found) if not damage(path))
    last = next(islice(whole, kept - 1, None), len(found))
    return found[last + 1 :]


def _newest_first(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def damage(path: Path, trust_pickle: bool = False) -> str:
    """Why a checkpoint cannot be resumed from, as far as its index and the sizes of its files tell; empty if it can."""
    try:
        if path.is_dir():
            return _shards_damage(path, trust_pickle)
        with zipfile.ZipFile(path):  # its directory lies at the end
            return ""
    except Exception as error:  # a damaged index, which is a pickle, may raise anything
        return f"cannot be read ({type(error).__name__}: {short(str(error))})"


def corruption(path: Path) -> str:
    """Return which part of a checkpoint's file does not have its checksum, or an empty string; shards have none."""
    if path.is_dir():
        return ""
    with zipfile.ZipFile(path) as file:
        part = file.testzip()
    return f"is damaged: its part {part} does not have the checksum in the file" if part else ""


def _weights_damage(path: Path) -> str:
    try:
        if why := corruption(path):
            return why
        return weights_problem(path)
    except Exception as error:  # damaged bytes may raise anything on their way through torch
        return f"cannot be read ({type(error).__name__}: {short(str(error))})"


def _shards_damage(folder: Path, trust_pickle: bool) -> str:
    ends: dict[str, int] = {}
    for part in read_index(folder, trust_pickle).storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, wanted in sorted(ends.items()):
        if (size := (folder / name).stat().st_size) < wanted:
            return f"is cut: {name} has {size} bytes, its index says {wanted}"
    return ""
