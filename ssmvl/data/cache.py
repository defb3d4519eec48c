"""Shards in a bucket, kept on this machine: their index, and files that come whole and as the index says."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmvl.data.remote import fetch
from ssmvl.errors import DataError

ATTEMPTS = 3  # at fetching a shard
SOURCE = "fetched_from"  # in a cache: the URL; what lacks it is nobody's cache and is never deleted


class ShardError(DataError):
    """A shard cannot be fetched or read: no fault of one sample."""


def cached(url: str, split: str, cache: str | None) -> Path:
    """The folder that keeps the shards of `url/split`, with the index that is there now.

    Where it is another index than before, everything else goes. The first process of a node fetches; the others come
    after it.

    Args:
        url: of a folder.
        split: its subfolder.
        cache: holds a folder for each URL; `~/.cache/ssmvl/shards` if None.

    Raises:
        DataError: the index cannot be fetched or kept, or the folder holds files of another origin.
    """
    from filelock import FileLock
    from streaming.base.distributed import get_local_rank

    root = Path(cache).expanduser() if cache else Path.home() / ".cache" / "ssmvl" / "shards"
    local = root / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16] / split
    if get_local_rank() != 0:
        return local
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(local.with_name(f".{split}.lock")):
            fresh = local.with_name(f".{split}.index.json")
            fetch(f"{url.rstrip('/')}/{split}/index.json", fresh)
            _renew(local, fresh, f"{url.rstrip('/')}/{split}")
    except OSError as error:
        raise DataError(f"{local}: what is fetched from {url} cannot be kept there ({error})") from error
    return local


def _renew(local: Path, fresh: Path, url: str) -> None:
    """Put a fresh index in its place; without what belongs to another one, and what killed runs left."""
    index, known = local / "index.json", (local / SOURCE).is_file()
    old = local.with_name(f".{local.name}.old")  # renamed first: what is half deleted is used by nobody
    shutil.rmtree(old, ignore_errors=True)
    for partial in local.rglob(".*.partial"):
        partial.unlink(missing_ok=True)
    if not (known and index.is_file() and index.read_bytes() == fresh.read_bytes()):
        if not known and local.is_dir() and any(local.iterdir()):
            raise DataError(f"{local} holds files that did not come from a bucket; name another folder: cache")
        if local.is_dir():
            local.rename(old)
            shutil.rmtree(old)
        local.mkdir()
        (local / SOURCE).write_text(f"{url}\n")
    fresh.replace(index)


def fetch_shard(url: str, folder: Path, file: Mapping[str, Any]) -> None:
    """Fetch a file of an index from the folder `url`: whole and as the index says, or not at all.

    Args:
        url: of the folder.
        folder: where it will lie.
        file: its `basename`, `bytes` and `hashes`, as in the index.

    Raises:
        ShardError: it could not be fetched, or was damaged, `ATTEMPTS` times; or the index names a file elsewhere.
    """
    from streaming.base.hashing import get_hash
    from streaming.base.util import retry

    source, path = f"{url}/{file['basename']}", folder / file["basename"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ShardError(f"{source}: the index names a file outside of its folder")

    def check(partial: Path) -> None:
        data = partial.read_bytes()
        if len(data) != file["bytes"]:
            raise DataError(f"{source} has {len(data)} bytes, its index says {file['bytes']}")
        for name, expected in file["hashes"].items():
            if get_hash(name, data) != expected:
                raise DataError(f"{source} does not have the {name} hash in its index: it is damaged, send it anew")

    try:
        retry((DataError,), num_attempts=ATTEMPTS, initial_backoff=0.2, max_jitter=0.1)(
            lambda: fetch(source, path, check)
        )()
    except DataError as error:
        raise ShardError(str(error)) from error
