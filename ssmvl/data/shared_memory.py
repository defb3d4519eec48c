"""Shared-memory names of mosaicml-streaming: assigned to one run at a time, freed after a run was killed."""

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
WAIT = 30.0  # seconds to wait for another run to take its names; a run that takes longer hangs


@contextmanager
def prefix_lock() -> Iterator[None]:
    """Keep this user's other runs on this machine from choosing a prefix. Every rank enters it.

    Streaming takes the first free prefix, and two runs that search at the same time find the same one. Continues
    without the lock if it cannot be created, or not be acquired within `WAIT` seconds.
    """
    leader = int(os.environ.get("RANK", 0)) % int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 0  # as in streaming's World
    with _locked() if leader else nullcontext():
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()
        yield


def stale_segments() -> list[Path]:
    """List streaming's segments and lock files that no living process maps; empty if /proc is not available.

    Streaming's own `clean_stale_shared_memory` would also remove those of living runs.
    """
    if not Path("/proc/self/maps").exists():
        return []
    uid = Path("/proc/self").stat().st_uid
    groups: dict[str, list[Path]] = {}
    for path in (*SHM.glob("*"), *Path(tempfile.gettempdir()).glob("*_filelock")):
        match = SEGMENT.match(path.name)
        try:
            if match and path.stat().st_uid == uid:
                groups.setdefault(match[1], []).append(path)
        except FileNotFoundError:  # its run has just ended
            continue
    alive = _mapped_prefixes() if groups else set()
    return [path for prefix, paths in sorted(groups.items()) if prefix not in alive for path in sorted(paths)]


def clean_stale_segments() -> list[Path]:
    """Remove the files that `stale_segments` lists, and return them."""
    with _locked():
        stale = stale_segments()
        for path in stale:
            path.unlink(missing_ok=True)
        return stale


@contextmanager
def _locked() -> Iterator[None]:
    """Hold this user's lock. A process that holds it may acquire it again."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = SHM if SHM.is_dir() else Path(tempfile.gettempdir())
    lock = FileLock(folder / f"ssmvl-{user}.lock", timeout=WAIT, is_singleton=True)
    with suppress(OSError):  # includes Timeout
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
        except OSError:  # the process has ended or belongs to another user
            continue
        # a path followed by "(deleted)" was mapped from a run that has ended; another run may use its name now
        prefixes.update(re.findall(rf"{SHM}/(\d{{6}})_\w+$", text, re.MULTILINE))
    return prefixes
