"""Published data sets -> shards, in parts that several processes write; a rerun continues what a kill cut off."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from urllib.parse import urlparse

from ssmvl.data.conversion.manifest import OURS, check, confirm, conversion_settings
from ssmvl.data.conversion.parts import (
    INDEX,
    REPORT,
    SETTINGS,
    Summary,
    counted,
    get,
    present,
    put,
    write_part,
)
from ssmvl.data.conversion.progress import Progress
from ssmvl.data.conversion.records import Chunk
from ssmvl.data.conversion.sources import open_sources
from ssmvl.data.remote import is_remote
from ssmvl.data.shards import require_streaming
from ssmvl.data.workers import cores, processes
from ssmvl.errors import DataError

LISTED = ("s3", "gs", "oci")  # schemes whose buckets streaming can list, so that a rerun finds what is there


def convert(
    sources: Sequence[Path],
    out: str,
    *,
    images: Sequence[str] = (),
    split: str = "train",
    max_side: int | None = None,
    workers: int | None = None,
    part_size: int = 1024,
) -> Summary:
    """Write the samples of published files as shards to `out/split`, or finish what an earlier run began there.

    The same sources and settings give the same bytes, with any number of workers and after any number of kills.
    A folder is locked: a second conversion to it is refused. A URL is not; one that finds other settings there than
    its own, when it begins and before it publishes the index, stops.

    Args:
        sources: JSON, JSON lines, parquet, tars, or folders of these; read in this order.
        out: a folder or a URL such as `s3://bucket/folder`.
        images: `[PREFIX=]PATH` of folders or zips in which the images lie that the sources name.
        split: name of the subfolder.
        max_side: images that are larger are re-encoded with this longer side, in pixels.
        workers: processes that read and write; None: one for each core.
        part_size: most samples of one part; what a kill can cost is the parts that are being written.

    Raises:
        DataError: a source, image folder or `out` cannot be used, or `out` holds other data; what was finished stays.
    """
    require_streaming()
    workers = workers or cores()
    place = _place(out, split)
    origin = conversion_settings(sources, images, max_side, part_size)
    with _quiet(), _temporary() as temporary, _alone(place):
        there = present(place, temporary)
        noted = check(place, there, origin, sources, temporary)
        if INDEX in there:
            for name in (INDEX, REPORT):
                get(place, name, temporary / name)
            found = counted(temporary)
            anew = f"; after mending the images or sources, delete {place} and run again" if found.skipped else ""
            print(f"{place} is finished; nothing was changed{anew}", flush=True)
            return found
        with processes(workers) as pool:
            chunks = open_sources(sources, images, part_size)
            chunks = itertools.chain([next(chunks)], chunks)  # a wrong image folder is found before anything is written
            if not noted:
                (temporary / SETTINGS).write_text(json.dumps(origin, indent=2) + "\n")
                put(temporary, place, [SETTINGS])
                confirm(place, origin, temporary)
            names, found = _write_parts(pool, workers + 2, chunks, place, there, temporary, max_side)
        confirm(place, origin, temporary)
        _publish(names, found, place, temporary)
        return found


def _write_parts(
    pool: ProcessPoolExecutor,
    limit: int,
    chunks: Iterator[Chunk],
    place: str,
    there: set[str],
    temporary: Path,
    max_side: int | None,
) -> tuple[list[str], Summary]:
    """The names of all parts, in order, and what they hold; at most `limit` chunks are in memory."""
    names: list[str] = []
    running: dict[Future[Summary], float] = {}
    broken: DataError | None = None
    with Progress(place) as progress:
        while True:
            try:
                chunk = next(chunks, None)
            except DataError as error:  # what was read before is finished first
                broken, chunk = error, None
            if chunk is None:
                break
            name = f"part-{len(names):05}"
            names.append(name)
            if name in there:
                for file in (INDEX, REPORT):
                    get(place, f"{name}/{file}", temporary / name / file)
                progress.skip(counted(temporary / name), chunk.done)
                continue
            while len(running) >= limit:
                _finish_some(running, progress)
            running[pool.submit(write_part, chunk, place, name, temporary, max_side)] = chunk.done
        while running:
            _finish_some(running, progress)
    if broken:
        raise broken
    return names, progress.found


def _finish_some(running: dict[Future[Summary], float], progress: Progress) -> None:
    for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
        progress.add(future.result(), running.pop(future))
    progress.show()


def _publish(names: Sequence[str], found: Summary, place: str, temporary: Path) -> None:
    """Put the report and, last, the index of all parts in place."""
    from streaming.base.util import merge_index

    for name in names:
        if not (temporary / name).exists():
            for file in (INDEX, REPORT):
                get(place, f"{name}/{file}", temporary / name / file)
    with (temporary / REPORT).open("wb") as report:
        for name in names:
            report.write((temporary / name / REPORT).read_bytes())
    if not found.samples:
        raise _useless(names, found, place, temporary)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # merge_index leaves the files open
        # of copies: it takes a path with a # or ? in it for a URL
        merge_index([str(temporary / name / INDEX) for name in names], str(temporary))
    put(temporary, place, [REPORT, INDEX])


def _useless(names: Sequence[str], found: Summary, place: str, temporary: Path) -> DataError:
    """What to do where every sample was left out; of a folder, what was written is taken away."""
    with (temporary / REPORT).open() as lines:
        first = json.loads(next(lines))
    anew = f"after mending the images or sources, delete {place} and run again"
    if not is_remote(place):
        anew = "nothing is kept; after mending the images or sources, run again"
        for name in names:
            (Path(place) / name).rename(Path(place) / f".{name}.partial")  # swept away at the end
        (Path(place) / SETTINGS).unlink()
    why = f"{first['reason']} in record {first['record']} of {first['source']}: {first['detail']}"
    return DataError(f"none of the samples can be used: {found.left_out()}, e.g. {why}; {anew}")


@contextmanager
def _temporary() -> Iterator[Path]:
    """A folder for this process; those of processes that were killed are removed."""
    for path in Path(gettempdir()).glob("ssmvl-convert-*"):
        pid = re.match(r"ssmvl-convert-(\d+)-", path.name)
        with suppress(FileNotFoundError):  # another conversion was faster
            if pid and path.stat().st_uid == os.getuid() and not _runs(int(pid[1])):
                shutil.rmtree(path, ignore_errors=True)
    with TemporaryDirectory(prefix=f"ssmvl-convert-{os.getpid()}-") as folder:
        yield Path(folder)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _place(out: str, split: str) -> str:
    """The folder or URL of a split.

    Raises:
        DataError: `out` cannot be written to, or `split` is not the name of a folder in it.
    """
    scheme, host = urlparse(out)[:2]
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise DataError(f"--split {split!r} must name a folder in --out: a letter, digit or _ first, then also - and .")
    if not out or (scheme in LISTED and not host):
        raise DataError(f"--out {out!r} is no place; write a folder, or a URL with a bucket such as s3://bucket/folder")
    if not is_remote(out):
        return str(Path(out).expanduser() / split)
    if scheme not in LISTED:
        allowed = ", ".join(f"{scheme}://" for scheme in LISTED)
        what = f"shards can be converted to a folder, or to {allowed}; convert to a folder and copy it"
        raise DataError(f"--out {out}: {what}")
    return f"{out.rstrip('/')}/{split}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without streaming's warnings of folders that it makes or finds."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _alone(place: str) -> Iterator[None]:
    """No other process converts to the same folder, and nothing half written is or stays there; a URL is not locked."""
    if is_remote(place):
        yield
        return
    from filelock import FileLock, Timeout

    folder = Path(place)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise DataError(f"another conversion is writing {place}; wait for it or choose another --out") from error
    except OSError as error:
        raise DataError(f"{place} cannot be written ({error})") from error
    try:
        _sweep(place)
        yield
    finally:
        _sweep(place)
        lock.release()


def _sweep(place: str) -> None:
    for path in Path(place).glob(".*.partial"):
        if not OURS.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
