"""Local cache of shards in a bucket. Files are downloaded atomically and must match the index."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmvl.data.remote import fetch
from ssmvl.errors import DataError

ATTEMPTS = 3  # to fetch a shard
SOURCE = "fetched_from"  # holds the URL of a cache; a directory without this file is not a cache and is never deleted


class ShardError(DataError):
    """A shard cannot be fetched or read. A single damaged sample raises a plain DataError."""


def cached(url: str, split: str, cache: str | None) -> Path:
    """Return the directory that caches the shards of `url/split`, with the bucket's current index.

    If the index has changed, all cached shards are deleted. Only the first rank of a node fetches the index; the other
    ranks must call this function after the first has returned.

    Args:
        url: URL of the directory that contains the splits.
        split: subdirectory of the split.
        cache: directory with one subdirectory per URL; None means `~/.cache/ssmvl/shards`.

    Raises:
        DataError: the index cannot be fetched or stored, or the directory holds files from elsewhere.
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
        raise DataError(f"{local} cannot cache {url} ({error}); set `cache` to another directory") from error
    return local


def _renew(local: Path, fresh: Path, url: str) -> None:
    """Install a fresh index. Deletes shards cached under a different index, and partial files left by killed runs."""
    index, is_cache = local / "index.json", (local / SOURCE).is_file()
    old = local.with_name(f".{local.name}.old")  # renamed first, so that a half-deleted cache is never read
    shutil.rmtree(old, ignore_errors=True)
    for partial in local.rglob(".*.partial"):
        partial.unlink(missing_ok=True)
    if not (is_cache and index.is_file() and index.read_bytes() == fresh.read_bytes()):
        if not is_cache and local.is_dir() and any(local.iterdir()):
            raise DataError(f"{local} holds files that did not come from a bucket; set `cache` to another directory")
        if local.is_dir():
            local.rename(old)
            shutil.rmtree(old)
        local.mkdir()
        (local / SOURCE).write_text(f"{url}\n")
    fresh.replace(index)


def fetch_shard(url: str, folder: Path, file: Mapping[str, Any]) -> None:
    """Fetch one file listed in an index from the directory `url`, atomically; discard it unless it matches the index.

    Args:
        url: URL of the directory.
        folder: local directory to write to.
        file: the file's `basename`, `bytes` and `hashes`, as in the index.

    Raises:
        ShardError: all `ATTEMPTS` downloads failed or were damaged, or the index lists a file outside its directory.
    """
    from streaming.base.hashing import get_hash
    from streaming.base.util import retry

    source, path = f"{url}/{file['basename']}", folder / file["basename"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ShardError(f"{source}: the index lists a file outside its directory")

    def check(partial: Path) -> None:
        data = partial.read_bytes()
        if len(data) != file["bytes"]:
            raise DataError(f"{source} has {len(data)} bytes, but its index states {file['bytes']}")
        for name, expected in file["hashes"].items():
            if get_hash(name, data) != expected:
                raise DataError(f"{source} is damaged: it does not match its {name} hash in the index; upload it again")

    try:
        retry((DataError,), num_attempts=ATTEMPTS, initial_backoff=0.2, max_jitter=0.1)(
            lambda: fetch(source, path, check)
        )()
    except DataError as error:
        raise ShardError(str(error)) from error
