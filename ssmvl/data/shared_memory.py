"""Shared memory that killed runs left behind: found by looking whether any living process still maps it.

mosaicml-streaming's own `clean_stale_shared_memory` takes segments from living runs too.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

SEGMENT = re.compile(
    r"(\d{6})_(?:locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data|barrier_filelock|cache_filelock)$"
)
SHM = Path("/dev/shm")


def stale_segments() -> list[Path]:
    """Segments and lock files of streaming that no living process maps; empty where /proc does not tell."""
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
    found = stale_segments()
    for path in found:
        path.unlink(missing_ok=True)
    return found


def _mapped_prefixes() -> set[str]:
    prefixes = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:  # ended meanwhile, or another user's
            continue
        prefixes.update(re.findall(rf"{SHM}/(\d{{6}})_", text))
    return prefixes
