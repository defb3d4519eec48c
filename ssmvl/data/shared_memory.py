"""The names of mosaicml-streaming in shared memory: given to one run at a time, freed when a killed run left them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from torch import distributed

SEGMENT = re.compile(
    r"(\d{6})_(?:locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data|barrier_filelock|cache_filelock)$"
)
SHM = Path("/dev/shm")
WAIT = 60.0  # seconds for another run of this machine to find its names; longer, and it hangs


@contextmanager
def naming() -> Iterator[None]:
    """No other run of this user on this machine looks for free names meanwhile. Every rank enters it.

    Streaming takes the first name that is free, which two runs that look at once both find.
    """
    lock = _lock()
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        with suppress(Timeout):
            lock.acquire()
    try:
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()
        yield
    finally:
        if lock.is_locked:
            lock.release()


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
    """Remove what `stale_segments` finds, and return it; nothing while another run takes names."""
    try:
        with _lock():
            found = stale_segments()
            for path in found:
                path.unlink(missing_ok=True)
            return found
    except Timeout:
        return []


def _lock() -> FileLock:
    """This user's, on this machine; a process that holds it may take it again."""
    path = SHM / f"ssmvl-{os.getuid()}.lock" if SHM.is_dir() else Path(tempfile.gettempdir(), "ssmvl.lock")
    return FileLock(path, timeout=WAIT, is_singleton=True)


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
