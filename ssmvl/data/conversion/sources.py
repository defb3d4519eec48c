"""Source files and images of a published dataset -> chunks that any process can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from ssmvl.data.conversion.conversations import image_names
from ssmvl.data.conversion.images import ImageFolders
from ssmvl.data.conversion.json_files import json_chunks, json_records
from ssmvl.data.conversion.parquet import check_parquet, parquet_chunks
from ssmvl.data.conversion.records import Chunk, SourceFile
from ssmvl.data.conversion.tars import tar_chunks
from ssmvl.errors import DataError

ALLOWED = "*.json (a list of records), *.jsonl, *.parquet, *.tar, or a directory of parquet files or tars"
FIRST_RECORDS, FIRST_IMAGES = 10_000, 200  # maximum number checked in a JSON before the first chunk


def open_sources(sources: Sequence[Path], images: Sequence[str], size: int) -> Iterator[Chunk]:
    """Yield chunks of at most `size` records (parquet: complete row groups) in a deterministic order.

    Ids are unique across all sources: `#2`, `#3`, … is appended to repeated ones.

    Args:
        sources: JSON, JSON Lines, parquet, tar, or directories of the last two.
        images: directories or zips, `PATH` or `PREFIX=PATH`, with the images that a JSON names. The directory of the
            JSON is searched last.
        size: maximum number of records in a chunk.

    Raises:
        DataError: a source is missing or unsupported, or its images are not found (both before the first chunk), or a
            file is damaged (after the chunks before the damage).
    """
    paths = [path for source in sources for path in source_files_of(source)]
    folders = ImageFolders(images, Path())
    for path in paths:
        _check(path, folders)
    seen: dict[str, int] = {}
    total, offset = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        file = SourceFile(path, size, partial(_unique, seen), _Done(offset, path.stat().st_size, total))
        if path.suffix == ".parquet":
            yield from parquet_chunks(file)
        elif path.suffix == ".tar":
            yield from tar_chunks(file)
        else:
            yield from json_chunks(file, folders.with_default(path.parent))
        offset += path.stat().st_size
    if not seen:
        raise DataError(f"{', '.join(map(str, sources))}: the files contain no records")


@dataclass(frozen=True)
class _Done:
    """Share of one file that is read -> share of all files."""

    offset: int
    size: int
    total: int

    def __call__(self, share: float) -> float:
        return (self.offset + share * self.size) / self.total


def source_files_of(source: Path) -> list[Path]:
    """Return the files of a source, in order.

    Raises:
        DataError: the source does not exist, is unsupported, or is a directory without supported files.
    """
    if source.is_dir():
        paths = sorted(path for path in source.iterdir() if path.suffix in (".parquet", ".tar") and path.is_file())
        paths = [path for path in paths if not path.name.startswith(".")]
        if not paths:
            raise DataError(f"{source} is a directory without *.parquet or *.tar. Allowed sources: {ALLOWED}")
        return paths
    if not source.exists():
        raise DataError(f"{source} does not exist. Allowed sources: {ALLOWED}")
    if source.suffix not in (".json", ".jsonl", ".parquet", ".tar"):
        raise DataError(f"{source} is not a supported source. Allowed sources: {ALLOWED}")
    return [source]


def _check(path: Path, folders: ImageFolders) -> None:
    """Check that a file can be read, and for a JSON, that its images are found."""
    if path.suffix == ".parquet":
        check_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        _check_images(path, folders.with_default(path.parent))


def _check_images(path: Path, folders: ImageFolders) -> None:
    names: list[str] = []
    count = 0
    try:
        for record, _ in islice(json_records(path), FIRST_RECORDS):
            count += 1
            names += image_names(record)
            if len(names) >= FIRST_IMAGES:
                break
    except DataError:
        if not count:
            raise  # otherwise it is raised again after the records before it
    if not count:
        raise DataError(f"{path} contains no records")
    if names and not any(folders.find(name) for name in names):
        raise DataError(
            f"none of the first {len(names)} images of {path} is in {folders}, e.g. {names[0]}; give their location "
            "with --images [PREFIX=]DIRECTORY or --images [PREFIX=]ZIP"
        )


def _unique(seen: dict[str, int], id_: str) -> str:
    if id_ not in seen:
        seen[id_] = 1
        return id_
    while True:
        seen[id_] += 1
        if (numbered := f"{id_}#{seen[id_]}") not in seen:
            seen[numbered] = 1
            return numbered
