"""A conversion that was killed is finished by the same command, to the same bytes, without doing anything twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from convert_runs import children, ended, parts, source, start, tree, wait_until

from ssmvl.data.conversion.convert import convert

COUNT = 16_000  # 16 parts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    convert([made], str(out))
    return tree(out)


def kill_after(number: int, made: Path, out: Path) -> dict[Path, int]:
    """Kill the whole process group when so many parts are there; the finished files and when they were written."""
    process = start(made, "--out", out)
    wait_until(lambda: len(parts(out / "train")) >= number, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "train" / "index.json").exists()
    return {path: path.stat().st_mtime_ns for path in (out / "train").glob("part-*/*")}


@pytest.mark.parametrize("number", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_killed_and_run_again(number: int, made: Path, whole: dict[str, str], tmp_path: Path) -> None:
    finished = kill_after(number, made, tmp_path)
    assert len(finished) >= 3 * number
    assert convert([made], str(tmp_path)).samples == COUNT
    assert tree(tmp_path) == whole
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.mark.slow
def test_killed_at_ten_random_moments(made: Path, whole: dict[str, str], tmp_path: Path) -> None:
    for number in sorted(random.Random(0).sample(range(1, 13), 10)):
        kill_after(number, made, tmp_path)
    convert([made], str(tmp_path))
    assert tree(tmp_path) == whole


@pytest.mark.long
def test_killed_while_sending(
    made: Path,
    whole: dict[str, str],
    bucket: str,
    objects: Callable[[], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (temporary / f"ssmvl-convert-{os.getppid()}-x").mkdir()  # of a process that runs
    process = start(made, "--out", bucket)
    wait_until(lambda: any(name.endswith("part-00001/index.json") for name in objects()), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "train/index.json" not in objects()
    assert list(temporary.glob(f"ssmvl-convert-{process.pid}-*"))
    assert convert([made], bucket).samples == COUNT
    assert [path.name for path in temporary.glob("ssmvl-convert-*")] == [f"ssmvl-convert-{os.getppid()}-x"]
    shutil.rmtree(temporary)
    for name, data in objects().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert tree(tmp_path) == {name: hash_ for name, hash_ in whole.items() if name != ".train.lock"}


@pytest.mark.long
def test_ctrl_c_leaves_at_once_and_cleanly(made: Path, whole: dict[str, str], tmp_path: Path) -> None:
    process = start(made, "--out", tmp_path)
    wait_until(lambda: parts(tmp_path / "train"), process)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert workers
    ended(workers)
    assert not list((tmp_path / "train").glob(".*"))
    convert([made], str(tmp_path))
    assert tree(tmp_path) == whole


@pytest.mark.long
def test_workers_end_when_only_the_first_process_is_killed(made: Path, whole: dict[str, str], tmp_path: Path) -> None:
    process = start(made, "--out", tmp_path)
    wait_until(lambda: parts(tmp_path / "train"), process)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert workers
    ended(workers)
    convert([made], str(tmp_path))
    assert tree(tmp_path) == whole
