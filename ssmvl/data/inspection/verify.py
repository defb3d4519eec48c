"""Shards looked at, every byte: sizes, hashes, records, and images that decode. Finds all problems, repairs none."""

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
from ssmvl.data.workers import cores, processes
from ssmvl.errors import DataError, short

SLICE = 128  # samples that a process looks at before it takes others: a few large shards keep all processes busy
SHOWN = 50  # problems on the screen


@dataclass
class Found:
    """What was looked at, and what is wrong with it.

    Attributes:
        place: folder or URL.
        shards: in the indexes.
        samples: that could be taken apart.
        images: that were decoded, or should have been.
        bytes: of the shards that were read.
        problems: one line each, in the order of the shards.
    """

    place: str
    shards: int = 0
    samples: int = 0
    images: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [*self.problems[:SHOWN], *([f"… and {count - SHOWN:,} more"] if count > SHOWN else [])]
        counted = [(self.shards, "shard"), (self.samples, "sample"), (self.images, "image")]
        looked = ", ".join(f"{number:,} {what}{'s' * (number != 1)}" for number, what in counted)
        verdict = f"{count:,} problem{'s' * (count != 1)} found" if count else "no problem found"
        return "\n".join([*lines, f"{self.place}: {looked}, {decimal(self.bytes)}: {verdict}"])


class _Job(NamedTuple):
    """Some samples of one shard; who looks at the first looks at the whole file too."""

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
    """Look at every shard, every record and every image; shards in a bucket are fetched one by one and removed again.

    Args:
        folder: what `ssmvl data convert --out` wrote, or one split of it, or a URL of either; of a URL without an
            index.json the split `train` is taken.
        workers: processes; the cores available if None.

    Raises:
        DataError: there are no shards, or a process was killed.
    """
    require_streaming()
    found = Found(folder)
    jobs: list[_Job] = []
    with tempfile.TemporaryDirectory() as temporary:
        splits = fetch_index(folder, Path(temporary)) if is_remote(folder) else _local(folder)
        for split, path in splits.items():
            try:
                entries = read_index(path)
            except DataError as error:
                found.problems.append(str(error))
                continue
            found.shards += len(entries)
            for entry in entries:
                problem = entry_problem(entry)
                found.problems += [f"{split}/{_name(entry)}: {problem}"] if problem else []
                jobs += [] if problem else _jobs(split, entry)
    for seen in _looked_at(jobs, workers or cores()):
        found.samples += seen.samples
        found.images += seen.images
        found.bytes += seen.bytes
        found.problems += seen.problems
    return found


def find_splits(folder: Path) -> list[Path]:
    """The folders of shards that a folder is or holds, finished or not.

    Raises:
        DataError: there are none.
    """
    what = "give the folder that `ssmvl data convert --out` wrote, or one split in it"
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; {what}")
    for candidates in ([folder], sorted(folder.iterdir())):  # a conversion that was cut short has no index yet
        found = [path for path in candidates if (path / INDEX).is_file() or (path / SETTINGS).is_file()]
        if found:
            return found
    raise DataError(f"{folder}: neither {INDEX} nor a folder with one is in there; {what}")


def read_index(path: Path) -> list[dict[str, Any]]:
    """The shards that an index.json lists, one at least.

    Raises:
        DataError: it is missing, cut or damaged, or lists none.
    """
    try:
        shards = json.loads(path.read_bytes())["shards"]
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file: the conversion was cut short; run it again") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no index of MDS shards ({type(error).__name__}: {error})") from error
    if not (isinstance(shards, list) and shards and all(isinstance(shard, dict) for shard in shards)):
        raise DataError(f"{path} lists no shards; received {short(repr(shards))}")
    return shards


def _local(folder: str) -> dict[str, Path]:
    return {str(path): path / INDEX for path in find_splits(Path(folder))}


def fetch_index(url: str, folder: Path) -> dict[str, Path]:
    """Where the index of a URL, or of its split `train`, was fetched to."""
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


def _looked_at(jobs: list[_Job], workers: int) -> Iterator[_Seen]:
    """What processes saw, in the order of the jobs."""
    from tqdm import tqdm

    if not jobs:
        return
    with processes(min(workers, len(jobs))) as pool:
        results = pool.map(_look, jobs)
        with tqdm(desc="verifying", total=sum(j.last - j.first for j in jobs), unit=" samples", disable=None) as bar:
            for seen in results:
                bar.update(seen.job.last - seen.job.first)
                yield seen


def _look(job: _Job) -> _Seen:
    raw = job.entry["raw_data"]
    place = f"{job.split}/{raw['basename']}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, on oddities of files
            if not is_remote(job.split):
                return _look_into(job, Path(place), place)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "shard.mds"
                fetch(place, path)
                return _look_into(job, path, place)
    except FileNotFoundError:
        problems = [] if job.first else [f"{place}: there is no such file"]
    except DataError as error:
        problems = [str(error)]
    except OSError as error:
        problems = [f"{place}: cannot be read ({error})"]
    return _Seen(job, 0, 0, 0, problems)


def _look_into(job: _Job, path: Path, place: str) -> _Seen:
    from streaming.base.format import reader_from_json

    reader = reader_from_json("", None, job.entry)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        problems = [] if job.first else [f"{place}: {problem}" for problem in file_problems(job.entry, file)]
        table = os.pread(file.fileno(), 4 * (job.last - job.first + 1), 4 + 4 * job.first)
        places = np.frombuffer(table, np.uint32, len(table) // 4).tolist()  # of each sample, and the end of the last
        start = places[0] if places else 0
        data = os.pread(file.fileno(), max(0, min(size, max(places, default=0)) - start), start)
    images, lost = 0, []
    least = 4 * (job.entry["samples"] + 2)  # where the table of places ends
    for number in range(job.first, job.last):
        begin, end = places[number - job.first :][:2] if len(places) > number - job.first + 1 else (0, 0)
        if not max(least, start) <= begin < end <= size:
            lost.append(number)
            continue
        name, seen, wrong = sample_problems(reader, data[begin - start : end - start])
        images += seen
        problems += [f"{place}: sample {number} (id {name}): {problem}" for problem in wrong]
    if lost:
        which = f"sample {lost[0]}" if len(lost) == 1 else f"{len(lost)} of samples {lost[0]}…{lost[-1]}"
        problems.append(f"{place}: {which} not there: the file is cut, or its table of places is damaged")
    return _Seen(job, job.last - job.first - len(lost), images, 0 if job.first else size, problems)
