"""`ssmvl bench --suite training` with a few steps; the measured speeds are not checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ssmvl.benchmarks import training_cases as suite
from ssmvl.benchmarks.model_cases import compare
from ssmvl.cli import bench, main

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming emit warnings of their own


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    compared: list[str] = []

    def once(case: str, unit: str, *sides: object) -> object:
        compared.append(case)
        return compare(case, unit, *sides, rounds=1)  # type: ignore[arg-type]

    monkeypatch.setattr(suite.TrainingSize, "__new__", lambda cls: TINY)
    monkeypatch.setattr(suite, "compare", once)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--suite", "training", "--json", "rows.json"]) == 0
    rows = {row["case"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    counts = {"recipes bound": 1, "models built on meta": 1, "models built with values": 1}
    assert list(rows) == ["run / bare loop", "run, a core for data", *counts, "start"]
    assert compared == list(rows)[:2]
    assert {case: rows.pop(case)["value"] for case in counts} == counts
    assert all(row["value"] > 0 and row["case"] in bench.BARS for row in rows.values())
    assert rows["start"]["limit"] == suite.START
    assert "finetune 1/" not in capfd.readouterr().out


TINY = suite.TrainingSize(samples=256, steps=4)
