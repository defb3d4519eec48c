"""`ssmvl bench --suite data` on a few images; the measured values are checked only for plausibility."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssmvl.benchmarks import data_cases as suite
from ssmvl.cli import bench, main
from ssmvl.errors import DataError

TINY = suite.DataSize(images=40, repeats=2, conversations=300, side=32, batch=8)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    monkeypatch.setattr(suite.DataSize, "__new__", lambda cls: TINY)
    monkeypatch.setattr(suite, "compare", lambda *args, **more: compare(*args, rounds=1))
    assert main(["bench", "--suite", "data", "--json", str(tmp_path / "rows.json")]) == 0
    rows = {row["case"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in rows)
    return rows


compare = suite.compare


@pytest.mark.slow
def test_rows(rows: dict[str, Any]) -> None:
    assert list(rows) == [
        "convert, directory",
        "convert, zip",
        "verify",
        "load",
        "convert, texts",
        "memory, texts",
        "convert, images in a zip",
        "memory, images in a zip",
    ]
    for name, row in rows.items():
        assert row["value"] > 0
        if row["limit"] is not None:
            assert name in bench.BARS
            assert row["of_limit"] == pytest.approx(row["value"] / row["limit"])
    assert rows["memory, texts"]["limit"] == 1500
    assert rows["memory, texts"]["value"] > 20  # MB: Python and its libraries


def test_images_have_the_file_size_of_photographs_and_differ(tmp_path: Path) -> None:
    paths = suite.write_images(tmp_path, TINY)
    sizes = [path.stat().st_size for path in paths]
    assert len({path.read_bytes() for path in paths}) == len(sizes) == 40
    assert 15_000 < min(sizes) < max(sizes) < 70_000
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        assert [archive.read(path.name) for path in paths] == [path.read_bytes() for path in paths]


def test_conversations_are_as_long_as_in_the_papers(tmp_path: Path) -> None:
    suite.write_conversations(tmp_path / "many.json", tmp_path / "many.zip", 200)
    records = json.loads((tmp_path / "many.json").read_text())
    assert len({record["id"] for record in records}) == 200
    assert 1300 < (tmp_path / "many.json").stat().st_size / 200 < 1800
    with zipfile.ZipFile(tmp_path / "many.zip") as archive:
        assert {record["image"] for record in records} == set(archive.namelist())
        with archive.open(records[0]["image"]) as file:
            assert Image.open(file).size == (32, 32)


def test_the_peak_covers_all_processes() -> None:
    child = "import sys, time; held = bytearray(200_000_000); time.sleep(1)"
    parent = f"import subprocess, sys; held = bytearray(100_000_000); subprocess.run([sys.executable, '-c', '{child}'])"
    assert 290e6 < suite.peak_memory([sys.executable, "-c", parent]) < 400e6


def test_a_command_that_fails_raises_an_error() -> None:
    with pytest.raises(DataError, match="no such thing"):
        suite.peak_memory([sys.executable, "-c", "raise SystemExit('no such thing')"])
