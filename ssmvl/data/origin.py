"""What converted shards are made from: written down first, so that a rerun never mixes two conversions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssmvl.data.parts import get
from ssmvl.errors import DataError

FORMAT = 1  # counted up when the same sources would give other shards
SETTINGS = "conversion.json"
FILES = r"(conversion|index)\.json|skipped\.jsonl"
OURS = re.compile(rf"{FILES}|part-\d{{5,}}|\.(part-\d{{5,}}|({FILES})\.\d+)\.partial")  # while written, partial
OTHER_OUT = "choose another --out or delete it"


def settings(sources: Sequence[Path], images: Sequence[str], max_side: int | None, part_size: int) -> dict[str, Any]:
    """What decides the bytes of the parts.

    Raises:
        DataError: a source cannot be read.
    """
    try:
        described = [[file.name, size := file.stat().st_size, _digest(file, size)] for file in _files(sources)]
    except OSError as error:
        raise DataError(f"a source cannot be read ({error})") from error
    options = {"images": list(images), "max_side": max_side, "part_size": part_size}
    return {"format": FORMAT, "sources": described, **options}


def check(place: str, there: set[str], now: dict[str, Any], sources: Sequence[Path], temporary: Path) -> bool:
    """Whether what is there of a conversion tells these very settings; if not, they are to be written.

    A JSON that was cut off may have been mended: one that begins with the bytes of the former has its records too, so
    the parts that are there stay right.

    Args:
        place: the folder or URL of all parts.
        there: names in it.
        now: the settings of this run.
        sources: of this run.
        temporary: a folder for the settings that are there.

    Raises:
        DataError: there is something else, or the same of other sources or settings.
    """
    if foreign := sorted(name for name in there if not OURS.fullmatch(name)):
        raise DataError(f"{place} holds other files ({', '.join(foreign[:3])}); {OTHER_OUT}")
    if SETTINGS not in there:
        if shards := sorted(name for name in there if not name.endswith(".partial")):
            raise DataError(f"{place} holds shards of unknown origin ({shards[0]}, but no {SETTINGS}); {OTHER_OUT}")
        return False
    get(place, SETTINGS, temporary / SETTINGS)
    try:
        before = dict(json.loads((temporary / SETTINGS).read_text()))
        changed = [key for key in now if before.get(key) != now[key]]
        mended = changed == ["sources"] and _mended(before["sources"], _files(sources))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{place}/{SETTINGS} is damaged ({error}); {OTHER_OUT}") from error
    if changed and not mended:
        lines = [f"\n  {key}: {before.get(key)} there, {now[key]} now" for key in changed]
        raise DataError(f"{place} was begun with other settings; {OTHER_OUT}{''.join(lines)}")
    return not changed


def _files(sources: Sequence[Path]) -> list[Path]:
    folders = {source: sorted(source.glob("*.parquet")) + sorted(source.glob("*.tar")) for source in sources}
    return [file for source in sources for file in (folders[source] if source.is_dir() else [source])]


def _mended(before: Sequence[Any], files: Sequence[Path]) -> bool:
    return len(before) == len(files) and all(
        [name, digest] == [file.name, _digest(file, size)] and (size == file.stat().st_size or digest)
        for (name, size, digest), file in zip(before, files, strict=True)
    )


def _digest(file: Path, size: int) -> str:
    """The xxh64 of the first `size` bytes of a JSON; nothing for what may be larger than memory and slow to read."""
    import xxhash

    digest = xxhash.xxh64()
    if file.suffix != ".json":
        return ""
    with file.open("rb") as data:
        while size > 0 and (block := data.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
