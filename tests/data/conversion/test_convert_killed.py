"""A killed conversion is resumed by the same command, with the same bytes and without repeating finished parts."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from convert_runs import children, parts, source, start, tree, wait_until, wait_until_ended

from ssmvl.data.conversion.convert import convert

COUNT = 16_000  # 16 parts


@pytest.fixture(scope="module")
def json_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(scope="module")
def uninterrupted(json_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("uninterrupted")
    convert([json_path], str(out))
    return tree(out)


def kill_after(number: int, json_path: Path, out: Path) -> dict[Path, int]:
    """Kill the process group once `number` parts exist -> finished files and their modification times."""
    process = start(json_path, "--out", out)
    wait_until(lambda: len(parts(out / "train")) >= number, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "train" / "index.json").exists()
    return {path: path.stat().st_mtime_ns for path in (out / "train").glob("part-*/*")}


@pytest.mark.parametrize("number", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_a_killed_conversion_resumes(
    number: int, json_path: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    finished = kill_after(number, json_path, tmp_path)
    assert len(finished) >= 3 * number
    assert convert([json_path], str(tmp_path)).samples == COUNT
    assert tree(tmp_path) == uninterrupted
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.mark.slow
def test_a_conversion_killed_ten_times_resumes(json_path: Path, uninterrupted: dict[str, str], tmp_path: Path) -> None:
    for number in sorted(random.Random(0).sample(range(1, 13), 10)):
        kill_after(number, json_path, tmp_path)
    convert([json_path], str(tmp_path))
    assert tree(tmp_path) == uninterrupted


@pytest.mark.long
def test_a_conversion_killed_during_upload_resumes(
    json_path: Path,
    uninterrupted: dict[str, str],
    bucket: str,
    objects: Callable[[], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (temporary / f"ssmvl-convert-{os.getppid()}-x").mkdir()  # belongs to a running process
    process = start(json_path, "--out", bucket)
    wait_until(lambda: any(name.endswith("part-00001/index.json") for name in objects()), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "train/index.json" not in objects()
    assert list(temporary.glob(f"ssmvl-convert-{process.pid}-*"))
    assert convert([json_path], bucket).samples == COUNT
    assert [path.name for path in temporary.glob("ssmvl-convert-*")] == [f"ssmvl-convert-{os.getppid()}-x"]
    shutil.rmtree(temporary)
    for name, data in objects().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert tree(tmp_path) == {name: hash_ for name, hash_ in uninterrupted.items() if name != ".train.lock"}


@pytest.mark.long
def test_ctrl_c_exits_at_once_and_cleanly(json_path: Path, uninterrupted: dict[str, str], tmp_path: Path) -> None:
    process = start(json_path, "--out", tmp_path)
    wait_until(lambda: parts(tmp_path / "train"), process)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert workers
    wait_until_ended(workers)
    assert not list((tmp_path / "train").glob(".*"))
    convert([json_path], str(tmp_path))
    assert tree(tmp_path) == uninterrupted


@pytest.mark.long
def test_workers_exit_when_only_the_main_process_is_killed(
    json_path: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    process = start(json_path, "--out", tmp_path)
    wait_until(lambda: parts(tmp_path / "train"), process)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert workers
    wait_until_ended(workers)
    convert([json_path], str(tmp_path))
    assert tree(tmp_path) == uninterrupted
