"""What converted shards are made from: written down first, so that a rerun never mixes two conversions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssmvl.data.conversion.images import prefix_and_path
from ssmvl.data.conversion.parts import SETTINGS, get
from ssmvl.data.conversion.sources import source_files_of
from ssmvl.errors import DataError

FORMAT = 2  # counted up when the same sources would give other shards
FILES = r"(conversion|index)\.json|skipped\.jsonl"
OURS = re.compile(rf"{FILES}|part-\d{{5,}}|\.(part-\d{{5,}}|({FILES})\.\d+)\.partial")  # while written, partial
OTHER_OUT = "choose another --out or delete it"


def conversion_settings(
    sources: Sequence[Path], images: Sequence[str], max_side: int | None, part_size: int
) -> dict[str, Any]:
    """What decides the bytes of the parts: the sources, the places where their images are looked for, the options.

    Raises:
        DataError: a source cannot be read.
    """
    try:
        files = _files(sources)
        described = [[file.name, size := file.stat().st_size, _digest(file, size)] for file in files]
        places = [_described(spec) for spec in images]
    except OSError as error:
        raise DataError(f"a source cannot be read ({error})") from error
    # where images are looked for last
    beside = dict.fromkeys(str(file.parent.resolve()) for file in files if file.suffix in (".json", ".jsonl"))
    options = {"images": [*places, *(["", folder] for folder in beside)], "max_side": max_side, "part_size": part_size}
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
        what = f"other sources or settings; choose another --out, or delete {place} to do it anew"
        raise DataError(f"{place} was begun with {what}{''.join(lines)}")
    return not changed


def confirm(place: str, now: dict[str, Any], temporary: Path) -> None:
    """Look whether the settings in a place are those that this run put or found there.

    Raises:
        DataError: another conversion has put its own.
    """
    get(place, SETTINGS, temporary / SETTINGS)
    there = json.loads((temporary / SETTINGS).read_text())
    if there | now != there:
        raise DataError(
            f"another conversion, of other sources or settings, writes to {place} too; stop it, delete "
            f"{place}, and run one after the other or choose another --out"
        )


def _files(sources: Sequence[Path]) -> list[Path]:
    return [file for source in sources for file in source_files_of(source)]


def _described(spec: str) -> list[str | int]:
    prefix, path = prefix_and_path(spec)
    return [spec, path.stat().st_size] if path.is_file() else [prefix, str(path.resolve())]


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
