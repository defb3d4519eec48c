"""Published data sets, opened: which files are read, with which images, as chunks that any process can read."""

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

READ = "*.json (a list of records), *.jsonl, *.parquet, *.tar, or a folder of parquet files or tars"
LOOKED_AT, TRIED = 10_000, 200  # records of a JSON in which images are looked for first, and how many of these


def open_sources(sources: Sequence[Path], images: Sequence[str], size: int) -> Iterator[Chunk]:
    """Chunks of at most `size` records (parquet: whole row groups), in order, always the same for the same files.

    Ids are unique over all sources: one that comes again gets `#2`, `#3`, … appended.

    Args:
        sources: JSON, JSON lines, parquet, tar, or folders of the last two.
        images: folders or zips, `PATH` or `PREFIX=PATH`, for the images that a JSON names; its own folder by default.
        size: records of a chunk.

    Raises:
        DataError: a source is missing or nothing that is read, an image folder is wrong (both before the first chunk),
            or a file is damaged at some point (after the chunks before it).
    """
    paths = [path for source in sources for path in source_files_of(source)]
    folders = ImageFolders(images, Path())
    for path in paths:
        _check(path, folders)
    seen: dict[str, int] = {}
    total, before = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        file = SourceFile(path, size, partial(_unique, seen), _Done(before, path.stat().st_size, total))
        if path.suffix == ".parquet":
            yield from parquet_chunks(file)
        elif path.suffix == ".tar":
            yield from tar_chunks(file)
        else:
            yield from json_chunks(file, folders.beside(path.parent))
        before += path.stat().st_size
    if not seen:
        raise DataError(f"{', '.join(map(str, sources))}: no record in any of the files")


@dataclass(frozen=True)
class _Done:
    """Share of one file -> share of all."""

    before: int
    size: int
    total: int

    def __call__(self, share: float) -> float:
        return (self.before + share * self.size) / self.total


def source_files_of(source: Path) -> list[Path]:
    """The files that are read of a source, in order.

    Raises:
        DataError: it is missing, nothing that is read, or a folder without what is read.
    """
    if source.is_dir():
        found = sorted(path for path in source.iterdir() if path.suffix in (".parquet", ".tar") and path.is_file())
        found = [path for path in found if not path.name.startswith(".")]
        if not found:
            raise DataError(f"{source} is a folder without *.parquet and *.tar; what is read is {READ}")
        return found
    if not source.exists():
        raise DataError(f"{source}: there is no such file; what is read is {READ}")
    if source.suffix not in (".json", ".jsonl", ".parquet", ".tar"):
        raise DataError(f"{source} is nothing that is read, which is {READ}")
    return [source]


def _check(path: Path, folders: ImageFolders) -> None:
    """Look before the first chunk whether a file can be read, and whether its images are where they should be."""
    if path.suffix == ".parquet":
        check_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        _check_images(path, folders.beside(path.parent))


def _check_images(path: Path, folders: ImageFolders) -> None:
    names: list[str] = []
    whole = 0
    try:
        for record, _ in islice(json_records(path), LOOKED_AT):
            whole += 1
            names += image_names(record)
            if len(names) >= TRIED:
                break
    except DataError:
        if not whole:
            raise  # otherwise the same error comes when all before it is read
    if not whole:
        raise DataError(f"{path} holds no record")
    if names and not any(folders.find(name) for name in names):
        raise DataError(
            f"none of the first {len(names)} images of {path} is in {folders}, e.g. {names[0]}; say where they are "
            "with --images [PREFIX=]FOLDER or --images [PREFIX=]ZIP"
        )


def _unique(seen: dict[str, int], id_: str) -> str:
    if id_ not in seen:
        seen[id_] = 1
        return id_
    while True:
        seen[id_] += 1
        if (other := f"{id_}#{seen[id_]}") not in seen:
            seen[other] = 1
            return other
