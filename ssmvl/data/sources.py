"""Published data sets, opened: which files are read, with which images, as chunks that any process can read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ssmvl.data.conversations import image_names, record_id, sample_type
from ssmvl.data.images import ImageFolders
from ssmvl.data.source_files import (
    Chunk,
    Image,
    Published,
    Record,
    Skipped,
    SourceFile,
    check_parquet,
    parquet_chunks,
    require,
)
from ssmvl.data.tars import tar_chunks
from ssmvl.errors import DataError, short

__all__ = ["Chunk", "Record", "Skipped", "open_sources", "source_files_of"]

READ = "*.json (a list of records), *.jsonl, *.parquet, *.tar, or a folder of parquet files or tars"
LOOKED_AT, TRIED = 10_000, 200  # records of a JSON in which images are looked for first, and how many of these
DEPTH = 64  # levels of lists and objects in a JSON; memory that ijson takes grows with their square
BRACKETS = bytes.maketrans(b"[{]}", b"\1\1\xff\xff")  # +1 and -1 as int8
TEXT = bytes(set(range(256)) - set(b'[{]}"'))
ESCAPED = re.compile(rb"\\.", re.DOTALL)
BOM = b"\xef\xbb\xbf"


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


@dataclass(frozen=True)
class JsonChunk(Chunk):
    """Records themselves, and where their images lie."""

    records: Sequence[Published]

    def _records(self) -> Iterable[Published]:
        return self.records


def json_chunks(file: SourceFile, folders: ImageFolders) -> Iterator[Chunk]:
    """A JSON or JSON-lines file, images looked up here so that no process that reads a chunk needs a directory.

    Raises:
        DataError: see `json_records`; the chunks before were given.
    """
    total, first, records = file.path.stat().st_size, 0, json_records(file.path)
    while batch := list(islice(records, file.size)):
        ids, published = [], []
        for number, (record, _) in enumerate(batch, first):
            names = image_names(record)
            ids.append(file.id(record_id(record), number))
            images = [Image(name, folders.find(name)) for name in names]
            published.append(Published(record, images, sample_type(record, names)))
        yield JsonChunk(str(file.path), first, file.done(batch[-1][1] / total), ids, published)
        first += len(batch)


def json_records(path: Path) -> Iterator[tuple[Any, int]]:
    """Each record of a JSON list, or of JSON lines, with the number of bytes read so far.

    Raises:
        DataError: it cannot be read, is no list, or is malformed from some byte on.
    """
    require("ijson", "JSON")
    import ijson

    lines, whole = path.suffix == ".jsonl", 0
    try:
        with path.open("rb") as file:
            start = len(BOM) if file.read(len(BOM)) == BOM else 0
            file.seek(start)
            begin = file.read(4096).lstrip()[:1]
            if lines and not begin:
                return
            if not lines and begin != b"[":
                what = {b"{": "an object", b"": "empty"}.get(begin, f"no JSON, beginning with {begin!r}")
                raise DataError(f"{path} is {what}; what is read is a JSON list of records, `[{{...}}, ...]`")
            file.seek(start)
            try:
                for record in ijson.items(
                    _Shallow(file, path), "" if lines else "item", multiple_values=lines, use_float=True
                ):
                    whole += 1
                    yield record, file.tell()
            except (ijson.JSONError, UnicodeDecodeError) as error:
                why = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
                wrong, cure = "is cut off or malformed", "mend it or download it again"
                if "integer overflow" in why:
                    wrong, cure = "has a number beyond 64 bits", "write it as a text"
                raise DataError(
                    f"{path} {wrong} at about byte {file.tell()}, after {whole} whole records "
                    f"({short(' '.join(why.split()))}); {cure}"
                ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read after {whole} records ({error})") from error


class _Shallow:
    """A JSON file to be read, which may not be nested deeper than `DEPTH`; its brackets outside of strings count."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.depth = self.quoted = 0
        self.rest = b""  # a backslash at the end, which belongs to what comes next

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        text = ESCAPED.sub(b"", self.rest + data)
        self.rest = b"\\" if text.endswith(b"\\") else b""
        # a pair of quotes side by side says nothing about what follows, and most are pairs once the text is gone
        parts = text.translate(None, TEXT).replace(b'""', b"").split(b'"')
        brackets = b"".join(parts[self.quoted :: 2]).translate(BRACKETS)
        self.quoted = (self.quoted + len(parts) - 1) % 2
        if brackets:
            depths = self.depth + np.cumsum(np.frombuffer(brackets, np.int8), dtype=np.int64)
            self.depth = int(depths[-1])
            if depths.max() > DEPTH:
                raise DataError(
                    f"{self.path} is nested more than {DEPTH} levels deep before byte {self.file.tell()}, which no "
                    "record needs; mend it or download it again"
                )
        return data
