"""Reader of JSON and JSON Lines files, record by record."""

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

MAX_DEPTH = 64  # levels of lists and objects in a JSON; ijson's memory grows with their square
BRACKETS = bytes.maketrans(b"[{]}", b"\1\1\xff\xff")  # +1 and -1 as int8
TEXT = bytes(set(range(256)) - set(b'[{]}"'))
ESCAPED = re.compile(rb"\\.", re.DOTALL)
BOM = b"\xef\xbb\xbf"
STRING_OR_NAN = re.compile(rb'"(?:\\.|[^"\\])*+(?:"|\\?\Z)|NaN|-?Infinity', re.DOTALL)
CUT = {bytes([letter]) for letter in b"-NaInfity"}  # last bytes of a chunk that may be part of `NaN` or `Infinity`
MAX_LINE, MAX_BLANK = 1 << 24, 100  # bytes of a line, and lines, that are read to recognize JSON Lines


@dataclass(frozen=True)
class JsonChunk(Chunk):
    """Parsed records with the locations of their images."""

    records: Sequence[Published]

    def _records(self) -> Iterable[Published]:
        return self.records


def json_chunks(file: SourceFile, folders: ImageFolders) -> Iterator[Chunk]:
    """Yield the chunks of a JSON or JSON Lines file.

    Images are located here, so that the processes that read chunks do not need the zips' directories.

    Raises:
        DataError: see `json_records`; raised after the chunks before it.
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
    """Yield each record of a JSON list or of JSON Lines, with the number of bytes read so far.

    Raises:
        DataError: the file cannot be read, is neither a list nor JSON Lines, or becomes malformed at some byte.
    """
    require("ijson", "JSON")
    import ijson

    count = 0
    try:
        with path.open("rb") as file:
            start = len(BOM) if file.read(len(BOM)) == BOM else 0
            file.seek(start)
            first = file.read(4096).lstrip()[:1]
            if path.suffix == ".jsonl" and not first:
                return
            file.seek(start)
            is_lines = first != b"[" and (path.suffix == ".jsonl" or _has_lines_of_objects(file))
            if not is_lines and first != b"[":
                kind = {b"{": "one object", b"": "empty"}.get(first, f"not JSON, beginning with {first!r}")
                advice = "if the records are under one of its keys, extract that list" if first == b"{" else ""
                allowed = "it must be a JSON list of records, `[{...}, ...]`, or JSON Lines"
                raise DataError(f"{path} is {kind}; {'; '.join(filter(None, (allowed, advice)))}")
            file.seek(start)
            try:
                for record in ijson.items(
                    _Shallow(file, path), "" if is_lines else "item", multiple_values=is_lines, use_float=True
                ):
                    count += 1
                    yield record, file.tell()
            except (ijson.JSONError, UnicodeDecodeError) as error:
                reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
                problem, advice = "is truncated or malformed", "fix it or download it again"
                if "integer overflow" in reason:
                    problem, advice = "has an integer beyond 64 bits", "write it as a string"
                raise DataError(
                    f"{path} {problem} at about byte {file.tell()}, after {count} complete records "
                    f"({short(' '.join(reason.split()))}); {advice}"
                ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read after {count} records ({error})") from error


def _has_lines_of_objects(file: BinaryIO) -> bool:
    """Return True if the first two lines that are not blank begin like objects, and the first ends like one."""
    lines = [line.strip() for line in (file.readline(MAX_LINE) for _ in range(MAX_BLANK)) if line.strip()][:2]
    return len(lines) == 2 and all(line.startswith(b"{") for line in lines) and lines[0].endswith(b"}")


class _Shallow:
    """A JSON file as ijson reads it, which raises an error when nested deeper than `MAX_DEPTH`.

    `NaN` and `Infinity`, which Python's json module writes but JSON does not have, are replaced by null. Brackets and
    these words count outside of strings only.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.depth = self.quoted = 0
        self.rest = b""  # a trailing backslash, which escapes the next byte

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        for _ in range(len(b"-Infinity")):  # do not cut such a word in two
            if data[-1:] not in CUT:
                break
            data += self.file.read(1)
        data = self._without_nan(data)
        text = ESCAPED.sub(b"", self.rest + data)
        self.rest = b"\\" if text.endswith(b"\\") else b""
        # adjacent quotes do not change the state, and once the text is removed most quotes are adjacent
        parts = text.translate(None, TEXT).replace(b'""', b"").split(b'"')
        brackets = b"".join(parts[self.quoted :: 2]).translate(BRACKETS)
        self.quoted = (self.quoted + len(parts) - 1) % 2
        if brackets:
            depths = self.depth + np.cumsum(np.frombuffer(brackets, np.int8), dtype=np.int64)
            self.depth = int(depths[-1])
            if depths.max() > MAX_DEPTH:
                raise DataError(
                    f"{self.path} is nested more than {MAX_DEPTH} levels deep before byte {self.file.tell()}, which no "
                    "record needs; fix it or download it again"
                )
        return data

    def _without_nan(self, data: bytes) -> bytes:
        if b"NaN" not in data and b"Infinity" not in data:
            return data
        before = (b'"' if self.quoted else b"") + self.rest
        text = STRING_OR_NAN.sub(lambda match: match[0] if match[0].startswith(b'"') else b"null", before + data)
        return text[len(before) :]
