"""The names of mosaicml-streaming in shared memory: given to one run at a time, freed when a killed run left them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock
from torch import distributed

SEGMENT = re.compile(
    r"(\d{6})_(?:locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data|barrier_filelock|cache_filelock)$"
)
SHM = Path("/dev/shm")
WAIT = 30.0  # seconds for another run to take its names; one that takes longer hangs, and is not waited for


@contextmanager
def prefix_lock() -> Iterator[None]:
    """No other run of this user looks for a free prefix on this machine meanwhile; every rank enters it.

    Streaming takes the first prefix that is free, which two runs that look at once both find. Without the lock after
    `WAIT` seconds, or where it cannot be had.
    """
    leader = int(os.environ.get("RANK", 0)) % int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 0  # as streaming's World
    with _locked() if leader else nullcontext():
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()
        yield


def stale_segments() -> list[Path]:
    """Segments and lock files of streaming that no living process maps; empty where /proc does not tell.

    Streaming's own `clean_stale_shared_memory` takes those of living runs too.
    """
    if not Path("/proc/self/maps").exists():
        return []
    mine = Path("/proc/self").stat().st_uid
    groups: dict[str, list[Path]] = {}
    for path in (*SHM.glob("*"), *Path(tempfile.gettempdir()).glob("*_filelock")):
        match = SEGMENT.match(path.name)
        try:
            if match and path.stat().st_uid == mine:
                groups.setdefault(match[1], []).append(path)
        except FileNotFoundError:  # its run ended just now
            continue
    alive = _mapped_prefixes() if groups else set()
    return [path for prefix, paths in sorted(groups.items()) if prefix not in alive for path in sorted(paths)]


def clean_stale_segments() -> list[Path]:
    """Remove what `stale_segments` finds, and return it."""
    with _locked():
        found = stale_segments()
        for path in found:
            path.unlink(missing_ok=True)
        return found


@contextmanager
def _locked() -> Iterator[None]:
    """A process that holds the lock may take it again."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = SHM if SHM.is_dir() else Path(tempfile.gettempdir())
    lock = FileLock(folder / f"ssmvl-{user}.lock", timeout=WAIT, is_singleton=True)
    with suppress(OSError):  # a Timeout is one
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _mapped_prefixes() -> set[str]:
    prefixes = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:  # ended meanwhile, or another user's
            continue
        # "(deleted)" follows what streaming looked at in a run that ended since; the name is another's now
        prefixes.update(re.findall(rf"{SHM}/(\d{{6}})_\w+$", text, re.MULTILINE))
    return prefixes
