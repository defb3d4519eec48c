"""The reader of WebDataset tars."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from ssmvl.data.conversion.conversations import TALKS, image_names
from ssmvl.data.conversion.images import Place
from ssmvl.data.conversion.media import IMAGE_FILE, MARK, OTHER_FILE
from ssmvl.data.conversion.records import Chunk, Image, Published, SourceFile
from ssmvl.errors import DataError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class TarChunk(Chunk):
    """Samples of a WebDataset tar: for each the members of one key."""

    members: Sequence[Sequence[Image]]

    def _records(self) -> Iterator[Published]:
        for members in self.members:
            images = [member for member in members if member.name.lower().endswith(PICTURES)]
            texts = {suffix: _text(members, suffix) for suffix in (".json", ".txt")}
            record = _parsed(texts[".json"])
            others = [m.name for m in members if m not in images and _is_media(m.name)]
            if not (isinstance(record, dict) and record.keys() & {*TALKS}):
                caption = record.get("caption", record.get("text")) if isinstance(record, dict) else None
                if (caption := texts[".txt"] if caption is None else caption) is not None:
                    images = images or [Image("an image beside the caption", None)]
                    told = {"texts": [{"user": "\n".join([MARK] * len(images)), "assistant": caption}]}
                    record = {**record, **told} if isinstance(record, dict) else told
            images = _in_order(images, image_names(record))
            unread = f"the tar's members {', '.join(others)} are not read" if others else ""
            yield Published(record, images, "" if images else "text", unread)


def tar_chunks(file: SourceFile) -> Iterator[Chunk]:
    """A WebDataset tar; only the headers of its members are read here.

    Raises:
        DataError: it is cut off, or no tar.
    """
    total, first, samples = file.path.stat().st_size, 0, groupby(_members(file.path), lambda found: found[0])
    keyed = ((key, list(members)) for key, members in samples)
    while batch := list(islice(keyed, file.size)):
        ids = [file.id(key, number) for number, (key, _) in enumerate(batch, first)]
        members = [[Image(name, place) for _, name, place in found] for _, found in batch]
        end = batch[-1][1][-1][2].offset
        yield TarChunk(str(file.path), first, file.done(end / total), ids, members)
        first += len(batch)


def _members(path: Path) -> Iterator[tuple[str, str, Place]]:
    """Key, name and place of each file in a tar."""
    at, total = 0, path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", errors="replace") as tar:
            file.seek(at)
            while (header := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):  # which ends the tar
                if len(header) < tarfile.BLOCKSIZE:
                    raise DataError(f"{path} is cut off: it ends before byte {at}, where a header or the end should be")
                file.seek(at)
                # tar.next() keeps all members, and takes a damaged header for the end
                member = tarfile.TarInfo.fromtarfile(tar)
                at = tar.offset
                if member.size < 0 or not member.offset < at <= total:
                    raise DataError(
                        f"{path} is damaged or cut off: its header at byte {member.offset} tells of {member.size} "
                        f"bytes, which the {total} bytes of the file cannot hold"
                    )
                folder, slash, base = member.name.rpartition("/")
                if member.isreg() and not base.startswith("."):
                    yield (
                        folder + slash + base.partition(".")[0],
                        member.name,
                        Place(path, member.offset_data, member.size),
                    )
                file.seek(at)
    except DataError:
        raise
    except (OSError, ValueError, OverflowError, MemoryError, tarfile.TarError) as error:
        raise DataError(
            f"{path} is no tar, or damaged, at byte {at} ({error}); compressed ones are not read"
        ) from error


def _in_order(images: list[Image], names: Sequence[str]) -> list[Image]:
    """The images in the order in which a record names them, where it names each; else as they are."""
    found = [next((image for image in images if f"/{image.name}".endswith(f"/{name}")), None) for name in names]
    named = [image for image in found if image is not None]
    return named if len(named) == len(names) > 0 and len({id(image) for image in named}) == len(images) else images


def _is_media(name: str) -> bool:
    return bool(IMAGE_FILE.fullmatch(name) or OTHER_FILE.fullmatch(name))


def _text(members: Sequence[Image], suffix: str) -> str | None:
    found = next((m.data for m in members if m.name.lower().endswith(suffix) and isinstance(m.data, Place)), None)
    return None if found is None else found.read().decode(errors="replace")


def _parsed(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text
