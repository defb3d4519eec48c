"""The README's claims about the quickstart, checked on full runs. Run by scripts/campaign."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

Composer = Callable[..., subprocess.Popen[str]]
Results = dict[str, dict[str, float]]
ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "quickstart.yaml")
FLOORS = {"recognition": 0.95, "counting": 0.95, "presence": 0.95, "spatial": 0.90, "reading": 0.92}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(autouse=True)
def in_the_workdir(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workdir)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run to end; print its seconds and the peak memory of its process tree, sampled every five seconds."""
    assert process.stdout is not None
    start, sampled, peak, lines = time.monotonic(), 0.0, 0, []
    with process:
        for line in process.stdout:
            lines.append(line)
            if time.monotonic() - sampled > 5:  # sampling uses the run's cores for a moment
                sampled, peak = time.monotonic(), max(peak, tree_bytes(process.pid))
    assert process.returncode == 0, "".join(lines[-40:])
    print(f"{time.monotonic() - start:.0f} s, {peak / 2**30:.2f} GiB at the peak")
    assert peak < 3e9
    return "".join(lines)


def tree_bytes(pid: int) -> int:
    """Return the memory of a process and its descendants, with shared pages counted once."""
    try:
        root = psutil.Process(pid)
        return sum(process.memory_full_info().pss for process in (root, *root.children(recursive=True)))
    except psutil.Error:  # it has ended
        return 0


def results(folder: Path) -> Results:
    loaded = json.loads((folder / "results.json").read_text())
    print(json.dumps(loaded))
    return loaded


def assert_as_claimed(measured: Results) -> None:
    assert measured.keys() == FLOORS.keys()
    for kind, floor in FLOORS.items():
        assert measured[kind]["accuracy"] >= floor
        assert max(measured[kind]["blind"], measured[kind]["swapped"]) <= measured[kind]["commonest"] + 0.05
        assert measured[kind]["n"] >= 1000


def assert_within(points: float, first: Results, second: Results) -> None:
    assert all(abs(first[kind]["accuracy"] - second[kind]["accuracy"]) <= points / 100 for kind in first)


def test_one_rank(composer: Composer) -> None:
    finish(composer(RECIPE))
    assert_as_claimed(results(Path("runs/quickstart")))


def test_two_ranks_end_with_the_same_accuracy(composer: Composer) -> None:
    finish(composer("-n", "2", RECIPE, "run=two"))
    one, two = results(Path("runs/quickstart")), results(Path("runs/two"))
    assert_as_claimed(two)
    assert_within(3, one, two)


def test_a_scan_order_from_another_package(composer: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*command, str(ROOT / "plugins" / "ssmvl-hilbert")], check=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finish(composer(RECIPE, "run=hilbert", "model.connector.scan_order=hilbert"))
    one, hilbert = results(Path("runs/quickstart")), results(Path("runs/hilbert"))
    assert_within(3, one, hilbert)


def test_a_killed_run_resumes_and_finishes(composer: Composer) -> None:
    process = composer(RECIPE, "run=three")
    assert process.stdout is not None
    for line in process.stdout:
        if " 230/1000" in line:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not Path("runs/three/model").exists()
    output = finish(composer(RECIPE, "run=three"))
    resumed = next(line for line in output.splitlines() if "stage finetune: resumed at step" in line)
    print(resumed)
    assert "resumed at step 200," in resumed
    assert_as_claimed(results(Path("runs/three")))
