"""Atomic file writes: write under a temporary name, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_whole", "flush"]

ABOUT_FILE = "ssmvl.json"  # marks the directory of a saved model


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path and rename it to `path` at the end, so that readers see either the old or the new file."""
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
    """Fsync a file or directory, so that a later rename survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
