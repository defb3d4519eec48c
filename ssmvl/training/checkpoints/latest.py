"""Find the complete checkpoints in a directory, the latest of them, and those to prune. Imports no Composer."""

from __future__ import annotations

import re
import zipfile
from itertools import islice
from pathlib import Path

from ssmvl.errors import short
from ssmvl.training.checkpoints.composer_files import read_index, weights_problem

CHECKPOINT = re.compile(r"ep\d+-ba(\d+)(-rank0\.pt)?")  # a file from one device or DDP, a directory if sharded


def latest_complete(
    folder: Path, trust_pickle: bool = False, finite: bool = False
) -> tuple[Path | None, dict[Path, str]]:
    """Return the latest complete checkpoint in a directory, or None, and what is wrong with each newer one.

    Args:
        folder: directory of a stage's checkpoints.
        trust_pickle: see `ssmvl.training.checkpoints.composer_files.read_index`.
        finite: also read the weights, and skip a checkpoint whose weights are not finite or are corrupted on disk.
    """
    skipped: dict[Path, str] = {}
    for path in _latest_first(folder):
        problem = damage(path, trust_pickle) or (_weights_damage(path) if finite else "")
        if not problem:
            return path, skipped
        skipped[path] = f"{path} {problem}"
    return None, skipped


def outdated(folder: Path, kept: int) -> list[Path]:
    """Return the checkpoints, including damaged ones, that are older than the latest `kept` complete ones."""
    checkpoints = _latest_first(folder)
    complete = (index for index, path in enumerate(checkpoints) if not damage(path))
    oldest_kept = next(islice(complete, kept - 1, None), len(checkpoints))
    return checkpoints[oldest_kept + 1 :]


def _latest_first(folder: Path) -> list[Path]:
    batches = [(int(match[1]), path) for path in folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(batches, reverse=True)]


def damage(path: Path, trust_pickle: bool = False) -> str:
    """Return why a checkpoint cannot be resumed from, judging by its index and file sizes; empty if it can."""
    try:
        if path.is_dir():
            return _shards_damage(path, trust_pickle)
        with zipfile.ZipFile(path):  # the zip directory is at the end
            return ""
    except Exception as error:  # a damaged index is a pickle and may raise any error
        return f"cannot be read ({type(error).__name__}: {short(str(error))})"


def corruption(path: Path) -> str:
    """Return a message that names the corrupted entry of a checkpoint file, or an empty string. Not for shards."""
    if path.is_dir():
        return ""
    with zipfile.ZipFile(path) as file:
        entry = file.testzip()
    return f"is damaged: its entry {entry} does not match the checksum in the file" if entry else ""


def _weights_damage(path: Path) -> str:
    try:
        return corruption(path) or weights_problem(path)
    except Exception as error:  # torch may raise any error for damaged bytes
        return f"cannot be read ({type(error).__name__}: {short(str(error))})"


def _shards_damage(folder: Path, trust_pickle: bool) -> str:
    ends: dict[str, int] = {}
    for part in read_index(folder, trust_pickle).storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        if (size := (folder / name).stat().st_size) < end:
            return f"is truncated: {name} has {size} bytes, but the index states {end}"
    return ""
