"""Which checkpoint a stage goes on from: the newest that is whole."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from ssmvl.checkpoints.run_files import read_index
from ssmvl.errors import short

LATEST = "latest-rank0.pt"  # the link that Composer resumes from
CHECKPOINT = re.compile(r"ep\d+-ba(\d+)(-rank0\.pt)?")  # of one device or DDP a file, sharded a folder


def choose_checkpoint(folder: Path) -> list[str]:
    """Make Composer resume from the newest checkpoint of a folder that is whole, or begin where there is none.

    Nothing is removed: a damaged checkpoint is written over when training comes to its step again.

    Returns:
        What is wrong with the newer ones, to be said.
    """
    newest, passed = newest_whole(folder)
    (folder / LATEST).unlink(missing_ok=True)
    if newest is not None:
        (folder / LATEST).symlink_to(newest.name)
    return passed


def newest_whole(folder: Path, trust_pickle: bool = False) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a folder that is whole, or None, and what is wrong with the newer ones."""
    found = sorted((int(match[1]), path) for path in folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name)))
    passed: list[str] = []
    for _, path in reversed(found):
        why = damage(path, trust_pickle)
        if not why:
            return path, passed
        passed.append(f"{path} {why}")
    return None, passed


def damage(path: Path, trust_pickle: bool = False) -> str:
    """Why a checkpoint cannot be resumed from, as far as its index and the sizes of its files tell; empty if it can."""
    try:
        if path.is_dir():
            return _shards_damage(path, trust_pickle)
        with zipfile.ZipFile(path):  # its directory lies at the end
            return ""
    except Exception as error:  # a damaged index, which is a pickle, may raise anything
        return f"cannot be read ({type(error).__name__}: {short(str(error))})"


def _shards_damage(folder: Path, trust_pickle: bool) -> str:
    parts = read_index(folder, trust_pickle).storage_data.values()
    for name in sorted({part.relative_path for part in parts}):
        wanted = max(part.offset + part.length for part in parts if part.relative_path == name)
        if (size := (folder / name).stat().st_size) < wanted:
            return f"is cut: {name} has {size} bytes, its index says {wanted}"
    return ""
