"""Processes that read and write shards beside each other, and are gone when their work ends, however it ends."""

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
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `number` processes. They run from the beginning, so what the caller opens later is not in them.

    On Linux they are forked, so that all share the memory of what streaming imports (some 600 MB). A thread of the
    caller's cannot block them: what they run uses neither torch nor any lock that was taken before.

    Raises:
        DataError: one of them was killed.
    """
    importlib.import_module("streaming")
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        number, multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"), _start
    )
    gc.freeze()  # a worker's collector would write to, and so copy, all of the shared memory
    try:
        pool.submit(int).result()
        gc.unfreeze()
        yield pool
    except BrokenProcessPool as error:
        raise DataError("a process was killed, as happens when memory runs out; try fewer --workers") from error
    finally:
        for worker in multiprocessing.active_children():
            if worker not in others:
                worker.kill()
        if sys.version_info < (3, 11, 5):  # whose pools wait for ever to write what nobody reads any more (gh-94777)
            vars(pool)["_call_queue"]._reader.close()
        pool.shutdown()


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
