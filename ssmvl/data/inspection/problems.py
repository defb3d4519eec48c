"""Checks of one shard: its entry in the index, its file, and each sample and image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from io import FileIO
from typing import Any

import numpy as np

from ssmvl.data.shards import COLUMNS, HASH, unpack_record
from ssmvl.errors import DataError, short
from ssmvl.processing.image_decoding import read_image
from ssmvl.processing.processor import IMAGE
from ssmvl.processing.prompts import turns


def entry_problem(entry: dict[str, Any]) -> str:
    """Return the reason why a shard cannot be read, judging by its index entry; empty if it can."""
    from streaming.base.format import reader_from_json

    if entry.get("format") != "mds":
        return f"its format is {entry.get('format')!r}; only 'mds' is supported"
    if entry.get("compression") or entry.get("zip_data"):
        return f"it is compressed ({entry.get('compression')}); write it again without compression"
    try:
        reader: Any = reader_from_json("", None, entry)
        columns = dict(zip(reader.column_names, reader.column_encodings, strict=True))
        if {name: columns.get(name) for name in COLUMNS} != COLUMNS:
            return f"its columns are {columns}, expected {COLUMNS}"
        reader.validate(allow_unsafe_types=False)  # rejects pickles in additional columns unread
        if HASH not in reader.raw_data.hashes:
            return f"the index has no {HASH} hash for it; write it again with that hash"
        if not 0 <= 4 * reader.samples <= reader.raw_data.bytes:  # the table of offsets has one number per sample
            return f"the index states {reader.samples} samples in {reader.raw_data.bytes} bytes, which is impossible"
    except Exception as error:  # a damaged entry may raise anything in streaming
        return f"its index entry is damaged ({type(error).__name__}: {error})"
    return ""


def file_problems(entry: dict[str, Any], file: FileIO) -> Iterator[str]:
    """Yield the problems of a shard file. Reads the whole file."""
    import xxhash  # comes with streaming

    digest: Any = xxhash.xxh64
    raw, size = entry["raw_data"], os.fstat(file.fileno()).st_size
    if size != raw["bytes"]:
        yield f"has {size:,} bytes, but its index states {raw['bytes']:,}"
    elif hashlib.file_digest(file, digest).hexdigest() != raw["hashes"][HASH]:
        yield f"does not match its {HASH} hash in the index: at least one byte has changed"
    if (samples := int.from_bytes(os.pread(file.fileno(), 4, 0), "little")) != entry["samples"]:
        yield f"states that it holds {samples:,} samples, but its index states {entry['samples']:,}"


def sample_problems(reader: Any, data: bytes) -> tuple[str, int, list[str]]:
    """Return a sample's id, its number of checked images, and its problems."""
    name = "unknown"
    try:
        fixed = [size for size in reader.column_sizes if size]
        heads = np.frombuffer(data, np.uint32, len(reader.column_sizes) - len(fixed))
        total = 4 * len(heads) + sum(heads.tolist()) + sum(fixed)
        if total != len(data):
            return name, 0, [f"its columns add up to {total:,} bytes, but it has {len(data):,}"]
        record = reader.decode_sample(data)
        name, sizes = repr(record["id"]), record["image_sizes"]
        if not (isinstance(sizes, list) and all(type(size) is int and size >= 0 for size in sizes)):
            return name, 0, [f"image_sizes must be a list of sizes in bytes, received {short(repr(sizes))}"]
        if sum(sizes) != len(record["images"]):
            size = len(record["images"])
            return name, 0, [f"its images have {size:,} bytes, but image_sizes adds up to {sum(sizes):,}"]
        images = unpack_record(record)["images"]
    except Exception as error:  # damaged bytes may raise anything
        return name, 0, [f"cannot be parsed ({type(error).__name__}: {error})"]
    problems = [_conversation_problem(record["conversation"], len(images))]
    for number, image in enumerate(images, start=1):
        problem = _image_problem(image)
        problems.append(f"image {number} of {len(images)}: {problem}" if problem else "")
    return name, len(images), [problem for problem in problems if problem]


def _conversation_problem(conversation: Any, images: int) -> str:
    try:
        if not isinstance(conversation, list):
            raise DataError(f"must be a list of messages, received {short(repr(conversation))}")
        marks = sum(question.count(IMAGE) for question, _ in turns(conversation))
    except DataError as error:
        return f"invalid conversation: {error}"
    return f"has {marks} {IMAGE} marks, but {images} images" if marks not in (0, images) else ""


def _image_problem(data: bytes) -> str:
    try:
        read_image(data)
    except DataError as error:
        return str(error).removeprefix("image bytes: ")
    return ""
