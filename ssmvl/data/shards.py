"""MDS shards in the library's own layout: written once, verified, written again when damaged.

One sample is a record `{"id": str, "type": str, "conversation": [messages], "images": [bytes]}`; `type` says what kind
of question it is, or where it comes from, and may be empty. In a shard the images are joined, their sizes beside them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmvl.data.cache import cached
from ssmvl.data.remote import is_remote
from ssmvl.errors import DataError, MissingDependencyError
from ssmvl.interfaces import Shards

if TYPE_CHECKING:
    from streaming import MDSWriter

__all__ = ["ensure_shards", "existing_shards"]

COLUMNS = {"id": "str", "type": "str", "conversation": "json", "images": "bytes", "image_sizes": "json"}
HASH = "xxh64"
SHARD_BYTES = 1 << 22
FILES = ("raw_data", "zip_data")  # keys of an index


def ensure_shards(folder: Path, records: Callable[[], Iterable[dict[str, Any]]], total: int) -> None:
    """Make sure that `folder` holds whole, undamaged shards of these records.

    Processes that come at once wait for the first; a folder appears complete or not at all.

    Args:
        folder: of the shards.
        records: called only if the shards must be written.
        total: number of records; a folder with another number is damaged.

    Raises:
        DataError: the folder cannot be written.
    """
    require_streaming()
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            damage = find_damage(folder, total)
            if not damage:
                return
            if folder.exists():
                print(f"{folder}: {damage}; writing it again", flush=True)
                shutil.rmtree(folder)
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            _write(partial, records(), total, f"writing {folder}")
            if damage := find_damage(partial, total):
                raise DataError(f"{folder}: what was written is not what was promised: {damage}")
            partial.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: shards cannot be written ({error})") from error


def find_damage(folder: Path, total: int) -> str:
    """What is wrong with the shards in `folder`: the first missing, cut or altered file; empty if nothing is."""
    from streaming.base.hashing import get_hash

    try:
        shards = json.loads((folder / "index.json").read_text())["shards"]
        # The index first: what it does not list cannot be looked at.
        if (listed := sum(shard["samples"] for shard in shards)) != total:
            return f"index.json lists {listed} samples, there should be {total}"
        for shard in shards:
            raw = shard["raw_data"]
            data = (folder / raw["basename"]).read_bytes()
            if len(data) != raw["bytes"]:
                return f"{raw['basename']} has {len(data)} bytes, its index says {raw['bytes']}"
            if get_hash(HASH, data) != raw["hashes"][HASH]:
                return f"{raw['basename']} does not have the {HASH} hash in its index"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def existing_shards(split: str, *, folder: str, cache: str | None = None) -> Path | Shards:
    """The shards of one split in a folder that was written before: `folder/train` for `train`.

    Args:
        split: name of the subfolder.
        folder: holds a folder of shards for each split; every shard has the columns of this module. May be a URL.
        cache: holds a folder for each URL, for what is fetched; `~/.cache/ssmvl/shards` if None.

    Raises:
        DataError: there are no shards, their index cannot be read, fetched, or lacks a column, or `cache` holds files
            of another origin; a shard on this machine is missing or cut.
    """
    if not is_remote(folder):
        if cache is not None:
            raise DataError(f"cache: {cache} is for a folder in a bucket; {folder} is on this machine, leave it out")
        _check_index(Path(folder) / split, split)
        return Path(folder) / split
    require_streaming()
    local, url = cached(folder, split, cache), f"{folder.rstrip('/')}/{split}"
    _check_index(local, split, url)
    return Shards(local, url)


def shard_writer(folder: Path, size: int) -> MDSWriter:
    """A writer of packed records to a folder, in shards of at most `size` bytes.

    It writes what streaming's own writes, byte by byte, and takes 70 % of its time: that one copies each byte four
    times before it is written, and sleeps for a second at the end if the thread that sends shards, which here go
    nowhere, has not begun yet.
    """
    from streaming import MDSWriter
    from streaming.base.format.mds.encodings import mds_encode

    class Writer(MDSWriter):
        def encode_sample(self, sample: dict[str, Any]) -> bytes:
            values = [mds_encode(kind, sample[name]) for name, kind in sorted(COLUMNS.items())]  # all of any length
            return b"".join([np.array([*map(len, values)], np.uint32).tobytes(), *values])

        def encode_joint_shard(self) -> bytes:
            ends = np.cumsum([0, *map(len, self.new_samples)])
            first = 4 * (1 + len(ends)) + len(self.config_data)
            head = np.array([len(self.new_samples), *(ends + first)], np.uint32)
            return b"".join([head.tobytes(), self.config_data, *self.new_samples])

        def _write_index(self) -> None:
            self.executor.submit(int).result()
            super()._write_index()

    # an absolute path, as a colon in a relative one would make it a URL
    return Writer(out=str(folder.absolute()), columns=COLUMNS, hashes=[HASH], size_limit=size)


def pack_record(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its images apart -> as it stands in a shard, one value for each of `COLUMNS`.

    Raises:
        DataError: the record lacks a key.
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be a mapping with id, type, conversation and images, received {record!r}")
    if lacking := [key for key in ("id", "type", "conversation", "images") if key not in record]:
        what = f"record {record.get('id', record)!r} lacks {', '.join(lacking)}"
        raise DataError(f"{what}; a record has id, type, conversation and images")
    sizes = [len(image) for image in record["images"]]
    return {**record, "images": b"".join(record["images"]), "image_sizes": sizes}


def unpack_record(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it stands in a shard -> with its images apart."""
    images, start = [], 0
    for size in record["image_sizes"]:
        images.append(record["images"][start : start + size])
        start += size
    return {"id": record["id"], "type": record["type"], "conversation": record["conversation"], "images": images}


def _check_index(folder: Path, split: str, url: str = "") -> None:
    """Find that an index lists shards of ours, each in its folder; those on this machine whole, as far as a size tells.

    Files of a cache that were cut are deleted, to be fetched again.
    """
    path = folder / "index.json"
    shown = f"{url}/index.json" if url else str(path)
    try:
        shards = json.loads(path.read_text())["shards"]
        lacking = sorted(COLUMNS.keys() - set.intersection(*(set(shard["column_names"]) for shard in shards)))
        files = [(shard[key]["basename"], shard[key]["bytes"]) for shard in shards for key in FILES if shard.get(key)]
        raw = {shard["raw_data"]["basename"]: shard["samples"] for shard in shards if not shard.get("zip_data")}
    except FileNotFoundError as error:
        wanted = f"`shards` takes a folder in which {split}/index.json lists the MDS shards of the split {split}"
        raise DataError(f"{shown} does not exist; {wanted}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{shown} is no index of MDS shards ({type(error).__name__}: {error})") from error
    if lacking:
        raise DataError(f"{shown}: the shards lack the columns {lacking}; each needs {', '.join(COLUMNS)}")
    for name, size in files:
        shard = folder / name
        if not shard.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{shown} lists {name!r}, which lies outside of its folder")
        there = shard.stat().st_size if shard.is_file() else None
        if url and there not in (None, size):
            shard.unlink()
        what = ""
        if there is None and name in raw:
            what = "is missing"
        elif there is not None and there != size:
            what = f"has {there} bytes, its index says {size}"
        elif there is not None and name in raw and _held(shard) != raw[name]:
            what = f"holds {_held(shard)} samples, its index says {raw[name]}"
        if what and not url:
            raise DataError(f"{shard} {what}; `ssmvl data verify {folder}` finds everything that is damaged")


def _held(shard: Path) -> int:
    """Number of samples, as the file itself says: MDS begins with it."""
    with shard.open("rb") as file:
        return int.from_bytes(file.read(4), "little")


def require_streaming() -> None:
    """Raise a clear error where mosaicml-streaming is not installed."""
    from importlib.util import find_spec

    if find_spec("streaming") is None:
        raise MissingDependencyError("reading shards needs mosaicml-streaming: pip install 'ssmvl[data]'")


def _write(folder: Path, records: Iterable[dict[str, Any]], total: int, what: str) -> None:
    from tqdm import tqdm

    folder.mkdir(parents=True)
    with shard_writer(folder, SHARD_BYTES) as writer:
        for record in tqdm(records, desc=what, total=total, unit=" samples"):
            writer.write(pack_record(record))
