"""Files written whole or not at all: a temporary name, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_whole", "flush"]

ABOUT_FILE = "ssmvl.json"  # of a folder that holds a saved model


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name to write under; renamed to `path` at the end, so a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    finally:
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Fsync a file or a folder, so that a rename after it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
