"""Verification of every byte of shards: sizes, hashes, records and images. Lists all problems and repairs none."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.filesize import decimal

from ssmvl.data.conversion.parts import INDEX, SETTINGS
from ssmvl.data.inspection.problems import entry_problem, file_problems, sample_problems
from ssmvl.data.remote import fetch, is_remote
from ssmvl.data.shards import require_streaming
from ssmvl.data.workers import at_most_cores, processes
from ssmvl.errors import DataError, short
from ssmvl.progress import progress

SLICE = 128  # samples per job, so that a few large shards keep all processes busy
SHOWN = 50  # problems to print


@dataclass
class Found:
    """Result of a verification.

    Attributes:
        location: directory or URL.
        shards: number of shards in the indexes.
        samples: number of samples that have valid offsets.
        images: number of images that were decoded or failed to decode.
        bytes: total size of the shards that were read.
        problems: one line per problem, in the order of the shards.
    """

    location: str
    shards: int = 0
    samples: int = 0
    images: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [*self.problems[:SHOWN], *([f"… and {count - SHOWN:,} more"] if count > SHOWN else [])]
        counted = [(self.shards, "shard"), (self.samples, "sample"), (self.images, "image")]
        checked = ", ".join(f"{number:,} {what}{'s' * (number != 1)}" for number, what in counted)
        verdict = f"{count:,} problem{'s' * (count != 1)} found" if count else "no problem found"
        return "\n".join([*lines, f"{self.location}: {checked}, {decimal(self.bytes)}: {verdict}"])


class _Job(NamedTuple):
    """Consecutive samples of one shard. The job with the first sample also checks the file as a whole."""

    split: str
    entry: dict[str, Any]
    first: int
    last: int


class _Seen(NamedTuple):
    job: _Job
    samples: int
    images: int
    bytes: int
    problems: list[str]


def verify(folder: str, workers: int | None = None) -> Found:
    """Check every shard, record and image. Shards in a bucket are fetched one by one and deleted afterwards.

    Args:
        folder: output directory of `ssmvl data convert`, one split in it, or the URL of either. A URL without an
            index.json means its split `train`.
        workers: number of processes; by default, and at most, one per core.

    Raises:
        DataError: there are no shards, or a process was killed.
    """
    require_streaming()
    result = Found(folder)
    jobs: list[_Job] = []
    with tempfile.TemporaryDirectory() as temporary:
        splits = fetch_index(folder, Path(temporary)) if is_remote(folder) else _local(folder)
        for split, path in splits.items():
            try:
                entries = read_index(path)
            except DataError as error:
                result.problems.append(str(error))
                continue
            result.shards += len(entries)
            for entry in entries:
                problem = entry_problem(entry)
                result.problems += [f"{split}/{_name(entry)}: {problem}"] if problem else []
                jobs += [] if problem else _jobs(split, entry)
    for seen in _results(jobs, at_most_cores(workers)):
        result.samples += seen.samples
        result.images += seen.images
        result.bytes += seen.bytes
        result.problems += seen.problems
    return result


def find_splits(folder: Path) -> list[Path]:
    """Return the directory itself or its subdirectories, whichever hold shards, complete or not.

    Raises:
        DataError: none of them holds shards.
    """
    advice = "give the output directory of `ssmvl data convert`, or one split in it"
    if not folder.is_dir():
        raise DataError(f"{folder} {'is not a directory' if folder.exists() else 'does not exist'}; {advice}")
    for candidates in ([folder], sorted(folder.iterdir())):  # an interrupted conversion has settings but no index
        splits = [path for path in candidates if (path / INDEX).is_file() or (path / SETTINGS).is_file()]
        if splits:
            return splits
    raise DataError(f"{folder} contains neither {INDEX} nor a directory with one; {advice}")


def read_index(path: Path) -> list[dict[str, Any]]:
    """Return the shards that an index.json lists, at least one.

    Raises:
        DataError: the index is missing, truncated or damaged, or lists no shards.
    """
    try:
        shards = json.loads(path.read_bytes())["shards"]
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: the conversion was interrupted; run it again") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not an index of MDS shards ({type(error).__name__}: {error})") from error
    if not (isinstance(shards, list) and shards and all(isinstance(shard, dict) for shard in shards)):
        raise DataError(f"{path} lists no shards; received {short(repr(shards))}")
    return shards


def _local(folder: str) -> dict[str, Path]:
    return {str(path): path / INDEX for path in find_splits(Path(folder))}


def fetch_index(url: str, folder: Path) -> dict[str, Path]:
    """Fetch the index of a URL or of its split `train`. Returns {URL of the shards: local path of the index}."""
    path, url = folder / INDEX, url.rstrip("/")
    try:
        fetch(f"{url}/{INDEX}", path)
        return {url: path}
    except DataError as error:
        try:
            fetch(f"{url}/train/{INDEX}", path)
            return {f"{url}/train": path}
        except DataError:
            raise error from None


def _name(entry: dict[str, Any]) -> str:
    raw = entry.get("raw_data")
    return str(raw.get("basename")) if isinstance(raw, dict) else short(repr(entry))


def _jobs(split: str, entry: dict[str, Any]) -> Iterator[_Job]:
    total = entry["samples"]
    step = max(1, total) if is_remote(split) else SLICE  # a remote shard is fetched once
    for first in range(0, max(1, total), step):
        yield _Job(split, entry, first, min(first + step, total))


def _results(jobs: list[_Job], workers: int) -> Iterator[_Seen]:
    """Yield the results of all jobs, in their order."""
    if not jobs:
        return
    with processes(min(workers, len(jobs))) as pool:
        results = pool.map(_verify, jobs)
        with progress(desc="verifying", total=sum(j.last - j.first for j in jobs), unit=" samples") as bar:
            for seen in results:
                bar.update(seen.job.last - seen.job.first)
                yield seen


def _verify(job: _Job) -> _Seen:
    raw = job.entry["raw_data"]
    location = f"{job.split}/{raw['basename']}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, about unusual files
            if not is_remote(job.split):
                return _verify_file(job, Path(location), location)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "shard.mds"
                fetch(location, path)
                return _verify_file(job, path, location)
    except FileNotFoundError:
        problems = [] if job.first else [f"{location}: the file does not exist"]
    except DataError as error:
        problems = [str(error)]
    except OSError as error:
        problems = [f"{location}: cannot be read ({error})"]
    return _Seen(job, 0, 0, 0, problems)


def _verify_file(job: _Job, path: Path, location: str) -> _Seen:
    from streaming.base.format import reader_from_json

    reader = reader_from_json("", None, job.entry)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        problems = [] if job.first else [f"{location}: {problem}" for problem in file_problems(job.entry, file)]
        table = os.pread(file.fileno(), 4 * (job.last - job.first + 1), 4 + 4 * job.first)
        offsets = np.frombuffer(table, np.uint32, len(table) // 4).tolist()  # starts of the samples, end of the last
        start = offsets[0] if offsets else 0
        data = os.pread(file.fileno(), max(0, min(size, max(offsets, default=0)) - start), start)
    images, missing = 0, []
    table_end = 4 * (job.entry["samples"] + 2)
    for number in range(job.first, job.last):
        begin, end = offsets[number - job.first :][:2] if len(offsets) > number - job.first + 1 else (0, 0)
        if not max(table_end, start) <= begin < end <= size:
            missing.append(number)
            continue
        name, sample_images, found = sample_problems(reader, data[begin - start : end - start])
        images += sample_images
        problems += [f"{location}: sample {number} (id {name}): {problem}" for problem in found]
    if missing:
        first, last = missing[0], missing[-1]
        which = f"sample {first} is" if len(missing) == 1 else f"{len(missing)} of samples {first}…{last} are"
        problems.append(f"{location}: {which} missing: the file is truncated, or its table of offsets is damaged")
    return _Seen(job, job.last - job.first - len(missing), images, 0 if job.first else size, problems)
