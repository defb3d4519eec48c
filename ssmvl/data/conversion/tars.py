"""Reader of WebDataset tars."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from ssmvl.data.conversion.conversations import CONVERSATION_FIELDS, image_names
from ssmvl.data.conversion.images import Place
from ssmvl.data.conversion.media import IMAGE_FILE, MARK, OTHER_FILE
from ssmvl.data.conversion.records import Chunk, Image, Published, SourceFile
from ssmvl.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class TarChunk(Chunk):
    """Samples of a WebDataset tar, each consisting of the members that share a key."""

    members: Sequence[Sequence[Image]]

    def _records(self) -> Iterator[Published]:
        for members in self.members:
            images = [member for member in members if member.name.lower().endswith(IMAGE_SUFFIXES)]
            texts = {suffix: _text(members, suffix) for suffix in (".json", ".txt")}
            record = _parsed(texts[".json"])
            unread = [m.name for m in members if m not in images and _is_media(m.name)]
            if not (isinstance(record, dict) and record.keys() & {*CONVERSATION_FIELDS}):
                caption = record.get("caption", record.get("text")) if isinstance(record, dict) else None
                if (caption := texts[".txt"] if caption is None else caption) is not None:
                    images = images or [Image("image of the caption", None)]
                    turns = {"texts": [{"user": "\n".join([MARK] * len(images)), "assistant": caption}]}
                    record = {**record, **turns} if isinstance(record, dict) else turns
            images = _in_order(images, image_names(record))
            message = f"the tar's members {', '.join(unread)} are not read" if unread else ""
            yield Published(record, images, "" if images else "text", message)


def tar_chunks(file: SourceFile) -> Iterator[Chunk]:
    """Yield the chunks of a WebDataset tar. Only the headers of its members are read here.

    Raises:
        DataError: the file is truncated, damaged or not a tar.
    """
    total, first, samples = file.path.stat().st_size, 0, groupby(_members(file.path), lambda member: member[0])
    keyed = ((key, list(members)) for key, members in samples)
    while batch := list(islice(keyed, file.size)):
        ids = [file.id(key, number) for number, (key, _) in enumerate(batch, first)]
        members = [[Image(name, location) for _, name, location in sample] for _, sample in batch]
        end = batch[-1][1][-1][2].offset
        yield TarChunk(str(file.path), first, file.done(end / total), ids, members)
        first += len(batch)


def _members(path: Path) -> Iterator[tuple[str, str, Place]]:
    """Yield key, name and location of each file in a tar."""
    offset, total = 0, path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", errors="replace") as tar:
            file.seek(offset)
            while (header := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):  # a block of zeros ends the tar
                if len(header) < tarfile.BLOCKSIZE:
                    raise DataError(f"{path} is truncated: no complete header or end marker at byte {offset}")
                file.seek(offset)
                # tar.next() would keep all members in memory, and treat a damaged header as the end
                member = tarfile.TarInfo.fromtarfile(tar)
                offset = tar.offset
                if member.size < 0 or not member.offset < offset <= total:
                    raise DataError(
                        f"{path} is damaged or truncated: its header at byte {member.offset} states {member.size} "
                        f"bytes, which do not fit in the {total} bytes of the file"
                    )
                folder, slash, base = member.name.rpartition("/")
                if member.isreg() and not base.startswith("."):
                    yield (
                        folder + slash + base.partition(".")[0],
                        member.name,
                        Place(path, member.offset_data, member.size),
                    )
                file.seek(offset)
    except DataError:
        raise
    except (OSError, ValueError, OverflowError, MemoryError, tarfile.TarError) as error:
        raise DataError(
            f"{path} is not a tar, or is damaged at byte {offset} ({error}); compressed tars are not supported"
        ) from error


def _in_order(images: list[Image], names: Sequence[str]) -> list[Image]:
    """Return images in the order in which a record names them, or unchanged unless it names each of them once."""
    matches = [next((image for image in images if f"/{image.name}".endswith(f"/{name}")), None) for name in names]
    named = [image for image in matches if image is not None]
    return named if len(named) == len(names) > 0 and len({id(image) for image in named}) == len(images) else images


def _is_media(name: str) -> bool:
    return bool(IMAGE_FILE.fullmatch(name) or OTHER_FILE.fullmatch(name))


def _text(members: Sequence[Image], suffix: str) -> str | None:
    location = next((m.data for m in members if m.name.lower().endswith(suffix) and isinstance(m.data, Place)), None)
    return None if location is None else location.read().decode(errors="replace")


def _parsed(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text
