"""Pool of processes that read and write shards in parallel, and always end with their work."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from ssmvl.errors import DataError


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_most_cores(workers: int | None) -> int:
    """Return the number of workers, by default one per core. More are reduced to that, with a note."""
    limit = cores()
    if workers is not None and workers > limit:
        if os.environ.get("RANK", "0") == "0":
            print(f"using {limit} workers instead of {workers}: this machine has {limit} cores", file=sys.stderr)
        return limit
    return limit if workers is None else workers


@contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """Start a pool of `number` processes. They start at once, so they do not inherit files that the caller opens later.

    On Linux they are forked, so that they share the memory of streaming's imports (about 600 MB). Threads of the caller
    cannot block them, because their work uses neither torch nor any lock taken before the fork.

    Raises:
        DataError: a process was killed.
    """
    importlib.import_module("streaming")
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        number, multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"), _start
    )
    gc.freeze()  # otherwise a worker's garbage collector writes to, and so copies, all of the shared memory
    try:
        pool.submit(int).result()
        gc.unfreeze()
        yield pool
    except BrokenProcessPool as error:
        raise DataError("a process was killed, possibly because memory ran out; try fewer --workers") from error
    finally:
        for worker in multiprocessing.active_children():
            if worker not in others:
                worker.kill()
        if sys.version_info < (3, 11, 5):  # pools wait forever to write to a pipe without readers (gh-94777)
            vars(pool)["_call_queue"]._reader.close()
        pool.shutdown()


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the others
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
