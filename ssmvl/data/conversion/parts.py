"""One part of converted data: written to a folder beside its place, then put there whole or not at all.

A place is a folder or a URL. In it lie the parts, and the files that say what they are made from and what they hold.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

from ssmvl.data.conversion.records import Chunk, Record, Skipped
from ssmvl.data.remote import fetch, hint, is_remote, send
from ssmvl.data.shards import pack_record, shard_writer
from ssmvl.errors import DataError
from ssmvl.files import flush, written_whole
from ssmvl.processing.image_decoding import shrunk

INDEX, REPORT = "index.json", "skipped.jsonl"
SETTINGS = "conversion.json"  # a place whose conversion was cut short has no index, only this
SHARD_BYTES = 1 << 24  # malloc keeps the memory of one for the next; with 64 MB, all that is written is paged in anew


class Summary(NamedTuple):
    """What a folder of converted shards holds, and what was left out of it."""

    samples: int
    bytes: int
    shards: int
    skipped: Counter[str]  # samples left out, by reason

    def plus(self, other: Summary) -> Summary:
        """Both together."""
        samples, size, shards = self.samples + other.samples, self.bytes + other.bytes, self.shards + other.shards
        return Summary(samples, size, shards, self.skipped + other.skipped)

    def left_out(self) -> str:
        """How many samples were left out, and why."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.skipped.items()))
        return f"{self.skipped.total():,} left out ({reasons})"

    def __str__(self) -> str:
        lines = [
            f"{self.samples:,} samples in {self.shards:,} shard{'s' * (self.shards != 1)}, {self.bytes / 1e6:,.1f} MB"
        ]
        if left := self.skipped.total():
            lines.append(f"{self.left_out()}; {REPORT} lists them")
        if left > self.samples:
            lines.append("warning: more than half of the samples were left out")
        return "\n".join(lines)


NOTHING = Summary(0, 0, 0, Counter())


def counted(folder: Path) -> Summary:
    """What the index and the report of skipped samples in a folder say."""
    shards = json.loads((folder / INDEX).read_text())["shards"]
    with (folder / REPORT).open() as lines:
        reasons = Counter(json.loads(line)["reason"] for line in lines)
    size = sum(shard["raw_data"]["bytes"] for shard in shards)
    return Summary(sum(shard["samples"] for shard in shards), size, len(shards), reasons)


def write_part(chunk: Chunk, place: str, name: str, temporary: Path, max_side: int | None) -> Summary:
    """Read a chunk and publish its samples as the part `name` of a place. Any process may do this.

    Args:
        chunk: what is read.
        place: the folder or URL of all parts.
        name: of the part.
        temporary: of a part that is sent, index and report stay here, in a folder `name`.
        max_side: larger images are re-encoded with this longer side, in pixels; None leaves every image as it is.

    Raises:
        DataError: the part cannot be written or sent; nothing of it is in its place, or no index of it.
    """
    try:
        if is_remote(place):
            shards = _write(chunk, temporary / name, max_side)
            send(temporary / name, f"{place}/{name}", [*shards, REPORT, INDEX])
            for shard in shards:
                (temporary / name / shard).unlink()
            return counted(temporary / name)
        partial = Path(place) / f".{name}.partial"
        written = [partial / file for file in [*_write(chunk, partial, max_side), REPORT, INDEX]]
        for path in [*written, partial]:
            flush(path)
        found = counted(partial)
        partial.rename(Path(place) / name)
        flush(Path(place))
        return found
    except OSError as error:
        raise DataError(f"{place}/{name} cannot be written ({error}); then the same command continues") from error


def present(place: str, temporary: Path) -> set[str]:
    """Names in a place: its files, and of the folders those that have an index.

    Raises:
        DataError: the bucket does not exist, refuses, or cannot be reached; the folder is none, or cannot be read.
    """
    try:
        if not is_remote(place):
            found = Path(place).iterdir() if Path(place).exists() else ()
            return {path.name for path in found if not path.name.startswith("part-") or (path / INDEX).exists()}
        from streaming.base.storage import CloudUploader

        uploader = CloudUploader.get((str(temporary), place), keep_local=True, exist_ok=True)
        start = urlparse(place).path.strip("/") + "/"  # also the name of an empty object, where a console made a folder
        names = [name.removeprefix(start).split("/") for name in uploader.list_objects() if name != start]
    except Exception as error:  # each cloud's library has errors of its own
        raise DataError(f"{place} cannot be read ({type(error).__name__}: {error}){hint(place)}") from error
    return {name[0] for name in names if len(name) == 1 or not name[0].startswith("part-") or name[1] == INDEX}


def get(place: str, name: str, path: Path) -> None:
    """Copy or fetch one file of a place.

    Raises:
        DataError: it cannot be had.
    """
    if is_remote(place):
        return fetch(f"{place}/{name}", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(place) / name, path)
    except OSError as error:
        raise DataError(f"{place}/{name} cannot be read ({error})") from error


def put(folder: Path, place: str, names: Sequence[str]) -> None:
    """Copy or send files of a folder to a place, in this order; each appears whole or not at all.

    Raises:
        DataError: the place cannot be written.
    """
    if is_remote(place):
        return send(folder, place, names)
    try:
        Path(place).mkdir(parents=True, exist_ok=True)
        for name in names:
            with written_whole(Path(place) / name) as partial:
                shutil.copyfile(folder / name, partial)
    except OSError as error:
        raise DataError(f"{place} cannot be written ({error})") from error


def _write(chunk: Chunk, folder: Path, max_side: int | None) -> list[str]:
    """The names of the shards that were written."""
    writer = shard_writer(folder, SHARD_BYTES)
    with (folder / REPORT).open("w") as report:
        for number, item in enumerate(chunk.read(), chunk.first):
            if max_side and not isinstance(item, Skipped):
                item = _shrunk(item, max_side, chunk.source, number)
            if isinstance(item, Skipped):
                report.write(json.dumps(item._asdict()) + "\n")
            else:
                writer.write(pack_record(item))
    writer.finish()
    return [shard["raw_data"]["basename"] for shard in writer.shards]


def _shrunk(record: Record, max_side: int, source: str, number: int) -> Record | Skipped:
    try:
        return {**record, "images": [shrunk(image, max_side) for image in record["images"]]}
    except DataError as error:
        return Skipped(record["id"], source, number, "damaged image", str(error))
