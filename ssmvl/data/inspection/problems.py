"""What is wrong with one shard: by its entry in the index, as a file, sample by sample, image by image."""

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
    """Why a shard cannot be looked at, by what the index says of it; empty if it can."""
    from streaming.base.format import reader_from_json

    if entry.get("format") != "mds":
        return f"its format is {entry.get('format')!r}; allowed is 'mds'"
    if entry.get("compression") or entry.get("zip_data"):
        return f"it is compressed ({entry.get('compression')}); write it anew without compression"
    try:
        reader: Any = reader_from_json("", None, entry)
        columns = dict(zip(reader.column_names, reader.column_encodings, strict=True))
        if {name: columns.get(name) for name in COLUMNS} != COLUMNS:
            return f"its columns are {columns}; needed are {COLUMNS}"
        reader.validate(allow_unsafe_types=False)  # of any other columns: a pickle is not opened
        if HASH not in reader.raw_data.hashes:
            return f"the index holds no {HASH} hash of it; write it anew with one"
        if not 0 <= 4 * reader.samples <= reader.raw_data.bytes:  # each has a number in the table of places
            return f"the index says that it has {reader.samples} samples in {reader.raw_data.bytes} bytes"
    except Exception as error:  # whatever a damaged entry makes streaming raise
        return f"what the index says of it is damaged ({type(error).__name__}: {error})"
    return ""


def file_problems(entry: dict[str, Any], file: FileIO) -> Iterator[str]:
    """What is wrong with a shard as a whole; its file is read from the beginning to the end."""
    import xxhash  # comes with streaming

    digest: Any = xxhash.xxh64
    raw, size = entry["raw_data"], os.fstat(file.fileno()).st_size
    if size != raw["bytes"]:
        yield f"has {size:,} bytes, its index says {raw['bytes']:,}"
    elif hashlib.file_digest(file, digest).hexdigest() != raw["hashes"][HASH]:
        yield f"does not have the {HASH} hash in its index: a byte or more of it changed"
    if (held := int.from_bytes(os.pread(file.fileno(), 4, 0), "little")) != entry["samples"]:
        yield f"says that it holds {held:,} samples, its index says {entry['samples']:,}"


def sample_problems(reader: Any, data: bytes) -> tuple[str, int, list[str]]:
    """A sample's id, how many images were looked at, and what is wrong."""
    name = "unknown"
    try:
        fixed = [size for size in reader.column_sizes if size]
        heads = np.frombuffer(data, np.uint32, len(reader.column_sizes) - len(fixed))
        total = 4 * len(heads) + sum(heads.tolist()) + sum(fixed)
        if total != len(data):
            return name, 0, [f"its columns take {total:,} bytes, it has {len(data):,}"]
        record = reader.decode_sample(data)
        name, sizes = repr(record["id"]), record["image_sizes"]
        if not (isinstance(sizes, list) and all(type(size) is int and size >= 0 for size in sizes)):
            return name, 0, [f"image_sizes must be a list of sizes in bytes, received {short(repr(sizes))}"]
        if sum(sizes) != len(record["images"]):
            return name, 0, [f"its images have {len(record['images']):,} bytes, their sizes add up to {sum(sizes):,}"]
        images = unpack_record(record)["images"]
    except Exception as error:  # any byte may be any other
        return name, 0, [f"cannot be taken apart ({type(error).__name__}: {error})"]
    problems = [_talk_problem(record["conversation"], len(images))]
    for number, image in enumerate(images, start=1):
        problem = _image_problem(image)
        problems.append(f"image {number} of {len(images)}: {problem}" if problem else "")
    return name, len(images), [problem for problem in problems if problem]


def _talk_problem(conversation: Any, images: int) -> str:
    try:
        if not isinstance(conversation, list):
            raise DataError(f"received {short(repr(conversation))}, a list of messages is needed")
        marks = sum(question.count(IMAGE) for question, _ in turns(conversation))
    except DataError as error:
        return f"is no conversation: {error}"
    return f"has {marks} {IMAGE} marks, but {images} images" if marks not in (0, images) else ""


def _image_problem(data: bytes) -> str:
    try:
        read_image(data)
    except DataError as error:
        return str(error).removeprefix("image bytes: ")
    return ""
