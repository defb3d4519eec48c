"""Parts of a converted dataset, each written atomically, and the files next to them.

The target of a conversion is a directory or a URL. It holds the parts, the settings, the index and the report of
skipped samples.
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
SETTINGS = "conversion.json"  # the target of an interrupted conversion has this, but no index
SHARD_BYTES = 1 << 24  # malloc reuses the memory of the previous shard; at 64 MB every shard would be paged in again


class Summary(NamedTuple):
    """Counts of converted shards and skipped samples."""

    samples: int
    bytes: int
    shards: int
    skipped: Counter[str]  # number of skipped samples by reason

    def plus(self, other: Summary) -> Summary:
        """Return the sum of both."""
        samples, size, shards = self.samples + other.samples, self.bytes + other.bytes, self.shards + other.shards
        return Summary(samples, size, shards, self.skipped + other.skipped)

    def describe_skipped(self) -> str:
        """Return the number of skipped samples and their reasons."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.skipped.items()))
        return f"{self.skipped.total():,} skipped ({reasons})"

    def __str__(self) -> str:
        lines = [
            f"{self.samples:,} samples in {self.shards:,} shard{'s' * (self.shards != 1)}, {self.bytes / 1e6:,.1f} MB"
        ]
        if skipped := self.skipped.total():
            lines.append(f"{self.describe_skipped()}, listed in {REPORT}")
        if skipped > self.samples:
            lines.append("warning: more than half of the samples were skipped")
        return "\n".join(lines)


EMPTY_SUMMARY = Summary(0, 0, 0, Counter())


def read_summary(folder: Path) -> Summary:
    """Summarize the index and the report of skipped samples in a directory."""
    shards = json.loads((folder / INDEX).read_text())["shards"]
    with (folder / REPORT).open() as lines:
        reasons = Counter(json.loads(line)["reason"] for line in lines)
    size = sum(shard["raw_data"]["bytes"] for shard in shards)
    return Summary(sum(shard["samples"] for shard in shards), size, len(shards), reasons)


def write_part(chunk: Chunk, target: str, name: str, temporary: Path, max_side: int | None) -> Summary:
    """Read a chunk and write its samples as the part `name` of the target. Any process may call this.

    Args:
        chunk: the records.
        target: the directory or URL of all parts.
        name: name of the part.
        temporary: index and report of an uploaded part are kept here, in a directory `name`.
        max_side: larger images are re-encoded with this longer side, in pixels; None changes no image.

    Raises:
        DataError: the part cannot be written or uploaded. The target then has no such part, or one without an index.
    """
    try:
        if is_remote(target):
            shards = _write(chunk, temporary / name, max_side)
            send(temporary / name, f"{target}/{name}", [*shards, REPORT, INDEX])
            for shard in shards:
                (temporary / name / shard).unlink()
            return read_summary(temporary / name)
        partial = Path(target) / f".{name}.partial"
        written = [partial / file for file in [*_write(chunk, partial, max_side), REPORT, INDEX]]
        for path in [*written, partial]:
            flush(path)
        summary = read_summary(partial)
        partial.rename(Path(target) / name)
        flush(Path(target))
        return summary
    except OSError as error:
        raise DataError(f"{target}/{name} cannot be written ({error}); run the same command again to resume") from error


def list_names(target: str, temporary: Path) -> set[str]:
    """List the names in a target. Parts without an index are omitted.

    Raises:
        DataError: the bucket does not exist, denies access or cannot be reached; or the directory cannot be read.
    """
    try:
        if not is_remote(target):
            paths = Path(target).iterdir() if Path(target).exists() else ()
            return {path.name for path in paths if not path.name.startswith("part-") or (path / INDEX).exists()}
        from streaming.base.storage import CloudUploader

        uploader = CloudUploader.get((str(temporary), target), keep_local=True, exist_ok=True)
        prefix = urlparse(target).path.strip("/") + "/"  # an empty object has this name if a console made the directory
        names = [name.removeprefix(prefix).split("/") for name in uploader.list_objects() if name != prefix]
    except Exception as error:  # each cloud's library has errors of its own
        raise DataError(f"{target} cannot be read ({type(error).__name__}: {error}){hint(target)}") from error
    return {name[0] for name in names if len(name) == 1 or not name[0].startswith("part-") or name[1] == INDEX}


def get(target: str, name: str, path: Path) -> None:
    """Copy or download one file of a target.

    Raises:
        DataError: the file cannot be read.
    """
    if is_remote(target):
        return fetch(f"{target}/{name}", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(target) / name, path)
    except OSError as error:
        raise DataError(f"{target}/{name} cannot be read ({error})") from error


def put(folder: Path, target: str, names: Sequence[str]) -> None:
    """Copy or upload files of a directory to a target, in this order, each atomically.

    Raises:
        DataError: the target cannot be written.
    """
    if is_remote(target):
        return send(folder, target, names)
    try:
        Path(target).mkdir(parents=True, exist_ok=True)
        for name in names:
            with written_whole(Path(target) / name) as partial:
                shutil.copyfile(folder / name, partial)
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error})") from error


def _write(chunk: Chunk, folder: Path, max_side: int | None) -> list[str]:
    """Write shards and report -> names of the shards."""
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
