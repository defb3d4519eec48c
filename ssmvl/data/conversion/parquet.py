"""Parquet files, whose rows hold their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmvl.data.conversion.conversations import TALKS
from ssmvl.data.conversion.media import FILE_WORDS, IMAGE_WORDS, OTHER_MEDIA, OTHER_WORDS, field_words
from ssmvl.data.conversion.records import Chunk, Image, Published, SourceFile, require
from ssmvl.errors import DataError, short

COLUMNS_OF_IMAGES, TYPES = ("image", "images"), ("data_source", "source")  # of a parquet
ROWS = 32  # of a parquet, read at once


@dataclass(frozen=True)
class ParquetChunk(Chunk):
    """Row groups of a parquet file."""

    groups: Sequence[int]

    def _records(self) -> Iterator[Published]:
        with _parquet(Path(self.source)) as file:
            number = self.first
            columns = [field.name for field in file.schema_arrow if _is_read(field)]
            for batch in file.iter_batches(ROWS, row_groups=list(self.groups), columns=columns, use_threads=False):
                rows = _values(batch, self.source, number)
                number += len(rows)
                for row in rows:
                    cells = [_cell(row.pop(column, None)) for column in COLUMNS_OF_IMAGES]
                    images, *more = [cell for cell in cells if cell] or [[]]
                    differ = more and [image.data for image in more[0]] != [image.data for image in images]
                    unread = "the columns image and images differ" if differ else ""
                    given = next((row[column] for column in TYPES if row.get(column)), "" if images else "text")
                    yield Published(row, images, str(given), unread)


def parquet_chunks(file: SourceFile) -> Iterator[Chunk]:
    """A parquet file in runs of whole row groups.

    Raises:
        DataError: it is damaged.
    """
    with _parquet(file.path) as opened:
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        first, begin = 0, 0
        while begin < len(sizes):
            end = begin + 1
            while end < len(sizes) and sum(sizes[begin : end + 1]) <= file.size:
                end += 1
            groups, rows = range(begin, end), sum(sizes[begin:end])
            given: Any = [None] * rows
            if "id" in opened.schema_arrow.names:
                given = opened.read_row_groups(list(groups), columns=["id"], use_threads=False)["id"]
                given = _values(given, str(file.path), first)
            ids = [file.id(id_, number) for number, id_ in enumerate(given, first)]
            yield ParquetChunk(str(file.path), first, file.done(end / len(sizes)), ids, groups)
            first, begin = first + rows, end


def check_parquet(path: Path) -> None:
    """Look whether a parquet file has the columns that are read.

    Raises:
        DataError: it has not, or is damaged.
    """
    with _parquet(path) as file:
        columns = {field.name: field.type for field in file.schema_arrow}
    texts = [str(columns[name]).startswith(("list<", "large_list<")) for name in TALKS if name in columns]
    images = [_holds_bytes(columns[name]) for name in COLUMNS_OF_IMAGES if name in columns]
    if not any(texts) or not all(images):
        found = ", ".join(f"{name}: {type_}" for name, type_ in columns.items())
        raise DataError(
            f"{path} has the columns {short(found)}; wanted are conversations, messages or texts (a list of structs), "
            "and where there are images, image or images (bytes, a struct with bytes, or a list of these)"
        )


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    require("pyarrow", "parquet")
    import pyarrow.parquet

    try:  # pages are read when they are needed: a whole row group of images may not fit in memory
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no parquet file, or is damaged ({short(str(error))})") from error


def _is_read(field: Any) -> bool:
    """Select the columns of samples, and others that may name or hold media, whose records are then refused."""
    from pyarrow import types

    if field.name in (*TALKS, *COLUMNS_OF_IMAGES, *TYPES):
        return True
    words = {*field_words(field.name)} & (IMAGE_WORDS | OTHER_WORDS | OTHER_MEDIA | FILE_WORDS)
    return bool(words) and not (types.is_temporal(field.type) or types.is_floating(field.type))


def _holds_bytes(type_: Any) -> bool:
    from pyarrow import types

    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        type_ = type_.value_type
    if types.is_struct(type_):
        place = type_.get_field_index("bytes")
        if place < 0:
            return False
        type_ = type_.field(place).type
    return types.is_null(type_) or types.is_binary(type_) or types.is_large_binary(type_)


def _values(cells: Any, source: str, first: int) -> list[Any]:
    """Rows or cells of a parquet, from record `first` on, in Python's own types."""
    number = first
    try:
        return cells.to_pylist()
    except UnicodeDecodeError:
        try:
            for number in range(first, first + len(cells)):
                cells.slice(number - first, 1).to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source}, record {number}: a text is no UTF-8 ({error}); mend the record or leave it out"
            ) from error
        raise


def _cell(cell: Any) -> list[Image]:
    images = cell if isinstance(cell, list) else [] if cell is None else [cell]
    structs = [image if isinstance(image, dict) else {"bytes": image} for image in images]
    return [Image(image.get("path") or f"image {number}", image["bytes"]) for number, image in enumerate(structs)]
