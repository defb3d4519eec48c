"""The README's promises at full length. Run by scripts/campaign."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Composer = Callable[..., subprocess.Popen[str]]
RECIPE = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
FLOORS = {"recognition": 0.95, "counting": 0.95, "presence": 0.95, "spatial": 0.90, "reading": 0.92}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


def results(folder: Path) -> dict[str, dict[str, float]]:
    found = json.loads((folder / "results.json").read_text())
    print(json.dumps(found))
    return found


def assert_promised(found: dict[str, dict[str, float]]) -> None:
    assert found.keys() == FLOORS.keys()
    for kind, floor in FLOORS.items():
        assert found[kind]["accuracy"] >= floor
        assert max(found[kind]["blind"], found[kind]["swapped"]) <= found[kind]["commonest"] + 0.05
        assert found[kind]["n"] >= 1000


def test_one_rank(workplace: Path, composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    start = time.monotonic()
    output, _ = (process := composer(RECIPE)).communicate()
    print(f"{time.monotonic() - start:.0f} s")
    assert process.returncode == 0, output[-3000:]
    assert_promised(results(Path("runs/quickstart")))


def test_two_ranks_end_with_the_same_accuracy(
    workplace: Path, composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    start = time.monotonic()
    output, _ = (process := composer("-n", "2", RECIPE, "run=two")).communicate()
    print(f"{time.monotonic() - start:.0f} s")
    assert process.returncode == 0, output[-3000:]
    one, two = results(Path("runs/quickstart")), results(Path("runs/two"))
    assert_promised(two)
    assert all(abs(one[kind]["accuracy"] - two[kind]["accuracy"]) <= 0.02 for kind in one)


def test_killed_and_started_again_finishes(
    workplace: Path, composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    process = composer(RECIPE, "run=three")
    assert process.stdout is not None
    for line in process.stdout:
        if " 130/400" in line:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert not Path("runs/three/model").exists()
    output, _ = (process := composer(RECIPE, "run=three")).communicate()
    assert process.returncode == 0, output[-3000:]
    said = next(line for line in output.splitlines() if "stage finetune: resumed at step" in line)
    print(said)
    assert "resumed at step 100," in said
    assert_promised(results(Path("runs/three")))
