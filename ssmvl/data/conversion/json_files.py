"""JSON and JSON Lines files, read record by record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ssmvl.data.conversion.conversations import image_names, record_id, sample_type
from ssmvl.data.conversion.images import ImageFolders
from ssmvl.data.conversion.records import Chunk, Image, Published, SourceFile, require
from ssmvl.errors import DataError, short

DEPTH = 64  # levels of lists and objects in a JSON; memory that ijson takes grows with their square
BRACKETS = bytes.maketrans(b"[{]}", b"\1\1\xff\xff")  # +1 and -1 as int8
TEXT = bytes(set(range(256)) - set(b'[{]}"'))
ESCAPED = re.compile(rb"\\.", re.DOTALL)
BOM = b"\xef\xbb\xbf"


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
