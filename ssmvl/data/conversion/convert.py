"""Conversion of published datasets to shards, in parts written by several processes; a rerun resumes."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from urllib.parse import urlparse

from ssmvl.data.conversion.manifest import OWN_NAMES, check_settings, confirm_settings, conversion_settings
from ssmvl.data.conversion.parts import (
    INDEX,
    REPORT,
    SETTINGS,
    Summary,
    get,
    list_names,
    put,
    read_summary,
    write_part,
)
from ssmvl.data.conversion.progress import Progress
from ssmvl.data.conversion.records import Chunk
from ssmvl.data.conversion.sources import open_sources
from ssmvl.data.remote import is_remote
from ssmvl.data.shards import require_streaming
from ssmvl.data.workers import at_most_cores, processes
from ssmvl.errors import DataError

LISTABLE = ("s3", "gs", "oci")  # schemes whose buckets streaming can list, which a rerun needs to find finished parts


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
    """Write the samples of published files as shards to `out/split`, or finish an interrupted conversion there.

    The same sources and settings give the same bytes, with any number of workers and after any number of
    interruptions. A directory is locked, and a second conversion to it is rejected. A URL is not locked: a conversion
    compares the settings stored there with its own when it starts and before it publishes the index, and stops if they
    differ.

    Args:
        sources: JSON, JSON Lines, parquet, tars, or directories of the last two; read in this order.
        out: a directory or a URL such as `s3://bucket/dir`.
        images: `[PREFIX=]PATH` of directories or zips with the images that the sources name.
        split: name of the subdirectory.
        max_side: larger images are re-encoded with this longer side, in pixels.
        workers: number of processes that read and write; by default, and at most, one per core.
        part_size: maximum number of samples in a part. An interruption loses only the parts that are being written.

    Raises:
        DataError: a source, image directory or `out` cannot be used, or `out` holds other data. Finished parts remain.
    """
    require_streaming()
    workers = at_most_cores(workers)
    target = _target(out, split)
    settings = conversion_settings(sources, images, max_side, part_size)
    with _quiet(), _temporary() as temporary, _locked(target):
        existing = list_names(target, temporary)
        has_settings = check_settings(target, existing, settings, sources, temporary)
        if INDEX in existing:
            for name in (INDEX, REPORT):
                get(target, name, temporary / name)
            summary = read_summary(temporary)
            advice = f"; after fixing the images or sources, delete {target} and run again" if summary.skipped else ""
            print(f"{target} is finished; nothing was changed{advice}", flush=True)
            return summary
        print(f"{target}: opening sources and images", file=sys.stderr, flush=True)
        with processes(workers) as pool:
            chunks = open_sources(sources, images, part_size)
            chunks = itertools.chain([next(chunks)], chunks)  # reports a wrong --images before anything is written
            if not has_settings:
                (temporary / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
                put(temporary, target, [SETTINGS])
                confirm_settings(target, settings, temporary)
            names, summary = _write_parts(pool, workers + 2, chunks, target, existing, temporary, max_side)
        confirm_settings(target, settings, temporary)
        _publish(names, summary, target, temporary)
        return summary


def _write_parts(
    pool: ProcessPoolExecutor,
    limit: int,
    chunks: Iterator[Chunk],
    target: str,
    existing: set[str],
    temporary: Path,
    max_side: int | None,
) -> tuple[list[str], Summary]:
    """Write the missing parts -> names of all parts, in order, and their summary. At most `limit` chunks in memory."""
    names: list[str] = []
    running: dict[Future[Summary], float] = {}
    source_error: DataError | None = None
    with Progress(target) as progress:
        while True:
            try:
                chunk = next(chunks, None)
            except DataError as error:  # raised once all chunks before it are written
                source_error, chunk = error, None
            if chunk is None:
                break
            name = f"part-{len(names):05}"
            names.append(name)
            if name in existing:
                for file in (INDEX, REPORT):
                    get(target, f"{name}/{file}", temporary / name / file)
                progress.skip(read_summary(temporary / name), chunk.done)
                continue
            while len(running) >= limit:
                _finish_some(running, progress)
            running[pool.submit(write_part, chunk, target, name, temporary, max_side)] = chunk.done
        while running:
            _finish_some(running, progress)
    if source_error:
        raise source_error
    return names, progress.summary


def _finish_some(running: dict[Future[Summary], float], progress: Progress) -> None:
    for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
        progress.add(future.result(), running.pop(future))
    progress.show()


def _publish(names: Sequence[str], summary: Summary, target: str, temporary: Path) -> None:
    """Write the report and, last, the merged index of all parts to the target."""
    from streaming.base.util import merge_index

    for name in names:
        if not (temporary / name).exists():
            for file in (INDEX, REPORT):
                get(target, f"{name}/{file}", temporary / name / file)
    with (temporary / REPORT).open("wb") as report:
        for name in names:
            report.write((temporary / name / REPORT).read_bytes())
    if not summary.samples:
        raise _no_sample_error(names, summary, target, temporary)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # merge_index leaves the files open
        # on local copies, because it treats a path that contains # or ? as a URL
        merge_index([str(temporary / name / INDEX) for name in names], str(temporary))
    put(temporary, target, [REPORT, INDEX])


def _no_sample_error(names: Sequence[str], summary: Summary, target: str, temporary: Path) -> DataError:
    """Return the error for a conversion whose samples were all skipped. The files in a local target are removed."""
    with (temporary / REPORT).open() as lines:
        first = json.loads(next(lines))
    advice = f"after fixing the images or sources, delete {target} and run again"
    if not is_remote(target):
        advice = "nothing is kept; after fixing the images or sources, run again"
        for name in names:
            (Path(target) / name).rename(Path(target) / f".{name}.partial")  # removed by _locked
        (Path(target) / SETTINGS).unlink()
    example = f"{first['reason']} in record {first['record']} of {first['source']}: {first['detail']}"
    return DataError(f"none of the samples can be used: {summary.describe_skipped()}, e.g. {example}; {advice}")


@contextmanager
def _temporary() -> Iterator[Path]:
    """Create a temporary directory for this process. Removes those of killed processes."""
    for path in Path(gettempdir()).glob("ssmvl-convert-*"):
        pid = re.match(r"ssmvl-convert-(\d+)-", path.name)
        with suppress(FileNotFoundError):  # removed by another conversion
            if pid and path.stat().st_uid == os.getuid() and not _is_running(int(pid[1])):
                shutil.rmtree(path, ignore_errors=True)
    with TemporaryDirectory(prefix=f"ssmvl-convert-{os.getpid()}-") as folder:
        yield Path(folder)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


def _target(out: str, split: str) -> str:
    """Return the directory or URL of a split.

    Raises:
        DataError: `out` cannot be written to, or `split` is not the name of a subdirectory.
    """
    scheme, host = urlparse(out)[:2]
    if not re.fullmatch(r"\w[\w.-]*", split):
        allowed = "a letter, digit or _, followed by letters, digits, _, - and ."
        raise DataError(f"--split must name a subdirectory of --out ({allowed}), received {split!r}")
    if not out or (scheme in LISTABLE and not host):
        raise DataError(f"--out must be a directory, or a URL with a bucket such as s3://bucket/dir, received {out!r}")
    if not is_remote(out):
        return str(Path(out).expanduser() / split)
    if scheme not in LISTABLE:
        allowed = ", ".join(f"{scheme}://" for scheme in LISTABLE)
        message = f"shards can be written to a directory, or to {allowed}; convert to a directory and copy it"
        raise DataError(f"--out {out}: {message}")
    return f"{out.rstrip('/')}/{split}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence streaming's warnings about directories that it creates or that exist."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


@contextmanager
def _locked(target: str) -> Iterator[None]:
    """Lock a local target, and remove partial files from it before and after. A URL is not locked."""
    if is_remote(target):
        yield
        return
    from filelock import FileLock, Timeout

    folder = Path(target)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise DataError(f"another conversion is writing {target}; wait for it or choose another --out") from error
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error})") from error
    try:
        _remove_partial(target)
        yield
    finally:
        _remove_partial(target)
        lock.release()


def _remove_partial(target: str) -> None:
    for path in Path(target).glob(".*.partial"):
        if not OWN_NAMES.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
