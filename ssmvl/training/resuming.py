"""Which checkpoint a stage goes on from: the newest that is whole."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader

from ssmvl.errors import short

LATEST = "latest-rank0.pt"  # the link that Composer resumes from
CHECKPOINT = re.compile(r"ep\d+-ba(\d+)(-rank0\.pt)?")  # of one device or DDP a file, sharded a folder


def choose_checkpoint(folder: Path) -> list[str]:
    """Make Composer resume from the newest checkpoint of a folder that is whole, or begin where there is none.

    Nothing is removed: a damaged checkpoint is written over when training comes to its step again.

    Returns:
        What is wrong with the newer ones, to be said.
    """
    found = sorted((int(match[1]), path) for path in folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name)))
    passed: list[str] = []
    (folder / LATEST).unlink(missing_ok=True)
    for _, path in reversed(found):
        why = damage(path)
        if not why:
            (folder / LATEST).symlink_to(path.name)
            break
        passed.append(f"{path} {why}")
    return passed


def damage(path: Path) -> str:
    """Why a checkpoint cannot be resumed from, as far as its index and the sizes of its files tell; empty if it can."""
    try:
        if path.is_dir():
            return _shards_damage(path)
        with zipfile.ZipFile(path):  # its directory lies at the end
            return ""
    except Exception as error:  # a damaged index, which is a pickle, may raise anything
        return f"cannot be read ({type(error).__name__}: {short(str(error))})"


def _shards_damage(folder: Path) -> str:
    parts = FileSystemReader(folder).read_metadata().storage_data.values()
    for name in sorted({part.relative_path for part in parts}):
        wanted = max(part.offset + part.length for part in parts if part.relative_path == name)
        if (size := (folder / name).stat().st_size) < wanted:
            return f"is cut: {name} has {size} bytes, its index says {wanted}"
    return ""
