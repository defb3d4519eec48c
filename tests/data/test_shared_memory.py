"""Concurrent runs get different names; the shared memory of killed runs is removed, that of living ones is kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN

from ssmvl.data import shared_memory
from ssmvl.data.shards import ensure_shards
from ssmvl.data.shared_memory import SEGMENT, SHM, clean_stale_segments, prefix_lock, stale_segments

pytestmark = pytest.mark.skipif(not (SHM.is_dir() and Path("/proc/self/maps").exists()), reason="needs /dev/shm, /proc")

PROCESS = """
import sys
from streaming import StreamingDataset
print("imported", flush=True)
sys.stdin.readline() or sys.exit()
dataset = StreamingDataset(local=sys.argv[1], batch_size=1)
print(f"{dataset._shm_prefix_int:06}", flush=True)
sys.stdin.readline()
print([sample["id"] for sample in dataset], flush=True)
"""

CONCURRENT = """
import multiprocessing, sys
from pathlib import Path
from ssmvl.data.streams import SampleStream

forked = multiprocessing.get_context("fork")
barrier = forked.Barrier(6)

def run():
    for _ in range(3):
        barrier.wait(100)
        stream = SampleStream(Path(sys.argv[1]), None, batch_size=1)

processes = [forked.Process(target=run, daemon=True) for _ in range(6)]
for process in processes:
    process.start()
for process in processes:
    process.join()
print([process.exitcode for process in processes])
"""

Process = subprocess.Popen[str]
Hold = Callable[[Process], str]


@pytest.fixture
def processes(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Process]]:
    """Start processes that have imported streaming but not opened a dataset; one, or the number in the parameter."""
    sample = {"id": "a", "type": "", "conversation": [], "images": []}
    ensure_shards(tmp_path / "shards", lambda: [sample], 1)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    started: list[Process] = []
    try:
        for _ in range(getattr(request, "param", 1)):
            process = subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(tmp_path / "shards")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
                start_new_session=True,
            )
            started.append(process)
        assert {line(process) for process in started} == {"imported"}
        yield started
    finally:
        for process in started:
            kill(process)


@pytest.fixture
def hold(processes: list[Process], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """Return a function that lets a process open a dataset and returns its prefix. Hides all other segments."""
    prefixes: list[str] = []

    def open_dataset(process: Process) -> str:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
        prefix = line(process)
        assert re.fullmatch(r"\d{6}", prefix)
        prefixes.append(prefix)
        own = SEGMENT.pattern.replace(r"\d{6}", "|".join(prefixes))
        monkeypatch.setattr(shared_memory, "SEGMENT", re.compile(own))
        return prefix

    # While this test holds the lock, other tests neither map or remove these segments nor take their names. They wait
    # for at most `WAIT`, so the processes run their imports before.
    with prefix_lock():
        yield open_dataset
        for process in processes:
            kill(process)
        for prefix in prefixes:
            for path in SHM.glob(f"{prefix}_*"):
                path.unlink()


def line(process: Process) -> str:
    assert process.stdout
    text = process.stdout.readline().strip()
    assert text, process.communicate(timeout=25)[1]
    return text


def kill(process: Process) -> None:
    """Kill a process and Python's resource tracker, which would clean up, as if the machine had failed."""
    if process.returncode is not None:
        return
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=25)


def segments(prefix: str) -> set[str]:
    return {path.name for path in SHM.glob(f"{prefix}_*")}


@pytest.mark.long
def test_concurrent_streams_get_different_names(tmp_path: Path) -> None:
    ensure_shards(tmp_path, lambda: [{"id": "a", "type": "", "conversation": [], "images": []}], 1)
    command = [sys.executable, "-c", CONCURRENT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == f"{[0] * 6}\n", done.stderr


def test_a_lock_that_cannot_be_created_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SHM", tmp_path)
    (tmp_path / f"ssmvl-{os.getuid()}.lock").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with prefix_lock():
        assert clean_stale_segments() == []


def test_a_lock_held_by_a_hanging_run_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SHM", tmp_path)
    monkeypatch.setattr(shared_memory, "WAIT", 0.1)
    with FileLock(tmp_path / f"ssmvl-{os.getuid()}.lock") as other, prefix_lock():
        assert other.is_locked


def test_every_name_used_by_streaming_matches() -> None:
    for name in (*SHM_TO_CLEAN, BARRIER_FILELOCK, CACHE_FILELOCK):
        match = SEGMENT.match(f"000012_{name}")
        assert match
        assert match[1] == "000012"
    for name in ("000012_mine", "x000012_locals", "000012_locals.bak", "locals"):
        assert not SEGMENT.match(name)


def test_segments_of_a_killed_process_are_removed(processes: list[Process], hold: Hold) -> None:
    prefix = hold(processes[0])
    kill(processes[0])
    stale = segments(prefix)
    assert f"{prefix}_locals" in stale
    assert {path.name for path in stale_segments()} >= stale
    assert segments(prefix) == stale
    removed = clean_stale_segments()
    assert {path.name for path in removed} >= stale
    assert segments(prefix) == set()
    assert stale_segments() == []
    assert not any(path.exists() for path in removed)


def test_lock_files_of_a_killed_process_are_removed(processes: list[Process], hold: Hold) -> None:
    prefix = hold(processes[0])
    lock = Path(tempfile.gettempdir(), f"{prefix}_barrier_filelock")
    lock.touch()
    assert lock not in stale_segments()
    kill(processes[0])
    assert lock in clean_stale_segments()
    assert not lock.exists()


@pytest.mark.long
@pytest.mark.parametrize("processes", [2], indirect=True)
def test_a_living_process_keeps_its_segments(processes: list[Process], hold: Hold) -> None:
    living, dead = processes
    prefix = hold(living)  # opened first, because streaming maps the segments of earlier processes
    dead_prefix = hold(dead)
    kill(dead)
    held = segments(prefix)
    assert f"{prefix}_locals" in held
    removed = clean_stale_segments()
    assert {path.name[:6] for path in removed} == {dead_prefix}
    assert segments(prefix) == held
    output, _ = living.communicate("\n", timeout=25)
    assert output == "['a']\n"
    assert living.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3], indirect=True)
def test_a_reused_name_is_removed_although_a_living_process_maps_deleted_segments(
    processes: list[Process], hold: Hold
) -> None:
    ended, living, dead = processes
    prefix = hold(ended)
    hold(living)  # maps the segments of the first process, and keeps the mapping after they are deleted
    ended.terminate()
    ended.communicate(timeout=25)
    assert hold(dead) == prefix
    kill(dead)
    assert {path.name for path in clean_stale_segments()} >= {f"{prefix}_locals"}
    assert segments(prefix) == set()


def test_nothing_is_removed_without_proc(processes: list[Process], hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = hold(processes[0])
    kill(processes[0])
    stale = segments(prefix)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert clean_stale_segments() == []
    assert segments(prefix) == stale
