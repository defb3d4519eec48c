"""Settings of a conversion, stored before its shards so that a rerun never mixes two conversions."""

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

FORMAT = 2  # incremented whenever the same sources would give different shards
FILES = r"(conversion|index)\.json|skipped\.jsonl"
OWN_NAMES = re.compile(rf"{FILES}|part-\d{{5,}}|\.(part-\d{{5,}}|({FILES})\.\d+)\.partial")  # partial: being written
OTHER_OUT = "choose another --out or delete it"


def conversion_settings(
    sources: Sequence[Path], images: Sequence[str], max_side: int | None, part_size: int
) -> dict[str, Any]:
    """Return everything that determines the bytes of the parts: sources, image locations and options.

    Raises:
        DataError: a source cannot be read.
    """
    try:
        files = _files(sources)
        described = [[file.name, size := file.stat().st_size, _digest(file, size)] for file in files]
        image_paths = [_describe_images(spec) for spec in images]
    except OSError as error:
        raise DataError(f"a source cannot be read ({error})") from error
    # directories that are searched last
    defaults = dict.fromkeys(str(file.parent.resolve()) for file in files if file.suffix in (".json", ".jsonl"))
    paths = [*image_paths, *(["", folder] for folder in defaults)]
    return {"format": FORMAT, "sources": described, "images": paths, "max_side": max_side, "part_size": part_size}


def check_settings(
    target: str, existing: set[str], settings: dict[str, Any], sources: Sequence[Path], temporary: Path
) -> bool:
    """Check that the target is unused or holds parts of this conversion. Return False if settings must be written.

    A truncated JSON may have been completed since. If it begins with the bytes of the former file, the finished parts
    remain valid.

    Args:
        target: the directory or URL of all parts.
        existing: names in the target.
        settings: those of this run.
        sources: those of this run.
        temporary: directory that receives the stored settings.

    Raises:
        DataError: the target holds other files, or a conversion of other sources or settings.
    """
    if others := sorted(name for name in existing if not OWN_NAMES.fullmatch(name)):
        raise DataError(f"{target} holds other files ({', '.join(others[:3])}); {OTHER_OUT}")
    if SETTINGS not in existing:
        if shards := sorted(name for name in existing if not name.endswith(".partial")):
            raise DataError(f"{target} holds shards of unknown origin ({shards[0]}, but no {SETTINGS}); {OTHER_OUT}")
        return False
    get(target, SETTINGS, temporary / SETTINGS)
    try:
        stored = dict(json.loads((temporary / SETTINGS).read_text()))
        changed = [key for key in settings if stored.get(key) != settings[key]]
        completed = changed == ["sources"] and _is_completion(stored["sources"], _files(sources))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{target}/{SETTINGS} is damaged ({error}); {OTHER_OUT}") from error
    if changed and not completed:
        lines = [f"\n  {key}: was {stored.get(key)}, now {settings[key]}" for key in changed]
        advice = f"choose another --out, or delete {target} to start over"
        raise DataError(f"{target} was started with other sources or settings; {advice}{''.join(lines)}")
    return not changed


def confirm_settings(target: str, settings: dict[str, Any], temporary: Path) -> None:
    """Check that the settings stored in the target are still those of this run.

    Raises:
        DataError: another conversion has replaced them.
    """
    get(target, SETTINGS, temporary / SETTINGS)
    stored = json.loads((temporary / SETTINGS).read_text())
    if stored | settings != stored:
        raise DataError(
            f"another conversion, of other sources or settings, also writes to {target}; stop it, delete "
            f"{target}, and run one after the other or choose another --out"
        )


def _files(sources: Sequence[Path]) -> list[Path]:
    return [file for source in sources for file in source_files_of(source)]


def _describe_images(spec: str) -> list[str | int]:
    prefix, path = prefix_and_path(spec)
    return [spec, path.stat().st_size] if path.is_file() else [prefix, str(path.resolve())]


def _is_completion(stored: Sequence[Any], files: Sequence[Path]) -> bool:
    """Return True if every file is unchanged, or is a JSON that begins with the bytes of its former version."""
    return len(stored) == len(files) and all(
        [name, digest] == [file.name, _digest(file, size)] and (size == file.stat().st_size or digest)
        for (name, size, digest), file in zip(stored, files, strict=True)
    )


def _digest(file: Path, size: int) -> str:
    """Return the xxh64 of the first `size` bytes of a JSON, or "" for other files.

    The others may be larger than memory and slow to read.
    """
    import xxhash

    digest = xxhash.xxh64()
    if file.suffix != ".json":
        return ""
    with file.open("rb") as data:
        while size > 0 and (block := data.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
