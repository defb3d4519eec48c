"""Reader of parquet files, whose rows contain their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmvl.data.conversion.conversations import CONVERSATION_FIELDS
from ssmvl.data.conversion.media import FILE_WORDS, IMAGE_WORDS, OTHER_MEDIA, OTHER_WORDS, field_words
from ssmvl.data.conversion.records import Chunk, Image, Published, SourceFile, require
from ssmvl.errors import DataError, short

IMAGE_COLUMNS, TYPE_COLUMNS = ("image", "images"), ("data_source", "source")
ROWS = 32  # read at once


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
                    cells = [_images(row.pop(column, None)) for column in IMAGE_COLUMNS]
                    images, *others = [cell for cell in cells if cell] or [[]]
                    differ = others and [image.data for image in others[0]] != [image.data for image in images]
                    unread = "the columns image and images differ" if differ else ""
                    type_ = next((row[column] for column in TYPE_COLUMNS if row.get(column)), "" if images else "text")
                    yield Published(row, images, str(type_), unread)


def parquet_chunks(file: SourceFile) -> Iterator[Chunk]:
    """Yield the chunks of a parquet file, each of one or more consecutive row groups.

    Raises:
        DataError: the file is damaged.
    """
    with _parquet(file.path) as opened:
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        first, begin = 0, 0
        while begin < len(sizes):
            end = begin + 1
            while end < len(sizes) and sum(sizes[begin : end + 1]) <= file.size:
                end += 1
            groups, rows = range(begin, end), sum(sizes[begin:end])
            stored_ids: Any = [None] * rows
            if "id" in opened.schema_arrow.names:
                column = opened.read_row_groups(list(groups), columns=["id"], use_threads=False)["id"]
                stored_ids = _values(column, str(file.path), first)
            ids = [file.id(id_, number) for number, id_ in enumerate(stored_ids, first)]
            yield ParquetChunk(str(file.path), first, file.done(end / len(sizes)), ids, groups)
            first, begin = first + rows, end


def check_parquet(path: Path) -> None:
    """Check that a parquet file has the required columns.

    Raises:
        DataError: columns are missing or have other types, or the file is damaged.
    """
    with _parquet(path) as file:
        columns = {field.name: field.type for field in file.schema_arrow}
    texts = [str(columns[name]).startswith(("list<", "large_list<")) for name in CONVERSATION_FIELDS if name in columns]
    images = [_holds_bytes(columns[name]) for name in IMAGE_COLUMNS if name in columns]
    if not any(texts) or not all(images):
        schema = ", ".join(f"{name}: {type_}" for name, type_ in columns.items())
        raise DataError(
            f"{path} has the columns {short(schema)}; expected: conversations, messages or texts (a list of structs), "
            "and for images, image or images (bytes, a struct with bytes, or a list of these)"
        )


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    require("pyarrow", "parquet")
    import pyarrow.parquet

    try:  # pages are read on demand: a row group of images may not fit in memory
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file, or is damaged ({short(str(error))})") from error


def _is_read(field: Any) -> bool:
    """Return True for columns of samples, and for others that may name or contain media, whose records are skipped."""
    from pyarrow import types

    if field.name in (*CONVERSATION_FIELDS, *IMAGE_COLUMNS, *TYPE_COLUMNS):
        return True
    words = {*field_words(field.name)} & (IMAGE_WORDS | OTHER_WORDS | OTHER_MEDIA | FILE_WORDS)
    return bool(words) and not (types.is_temporal(field.type) or types.is_floating(field.type))


def _holds_bytes(type_: Any) -> bool:
    from pyarrow import types

    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        type_ = type_.value_type
    if types.is_struct(type_):
        index = type_.get_field_index("bytes")
        if index < 0:
            return False
        type_ = type_.field(index).type
    return types.is_null(type_) or types.is_binary(type_) or types.is_large_binary(type_)


def _values(cells: Any, source: str, first: int) -> list[Any]:
    """Convert rows or cells of a parquet, the first of record `first`, to Python objects."""
    number = first
    try:
        return cells.to_pylist()
    except UnicodeDecodeError:
        try:
            for number in range(first, first + len(cells)):
                cells.slice(number - first, 1).to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source}, record {number}: a text is not valid UTF-8 ({error}); fix or remove the record"
            ) from error
        raise


def _images(cell: Any) -> list[Image]:
    images = cell if isinstance(cell, list) else [] if cell is None else [cell]
    structs = [image if isinstance(image, dict) else {"bytes": image} for image in images]
    return [Image(image.get("path") or f"image {number}", image["bytes"]) for number, image in enumerate(structs)]
