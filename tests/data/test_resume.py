"""Resuming is exact to the sample, even after the first epoch and with any stream weights (streaming#869)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssmvl.data import shards
from ssmvl.data.shards import ensure_shards

SCRIPT = Path(__file__).with_name("resume_script.py")
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
SIZES = {"a": 22, "b": 13}
WEIGHTS: dict[str, dict[str, dict[str, float]]] = {
    "one": {"a": {}},
    "one proportion": {"a": {"proportion": 1}},
    "one repeat above 1": {"a": {"repeat": 1.7}},
    "one repeat below 1": {"a": {"repeat": 0.6}},
    "one choose above its size": {"a": {"choose": 33}},
    "one choose below its size": {"a": {"choose": 13}},
    "two": {"a": {}, "b": {}},
    "two proportions": {"a": {"proportion": 0.25}, "b": {"proportion": 0.75}},
    "two repeats": {"a": {"repeat": 0.5}, "b": {"repeat": 2.3}},
    "two chooses": {"a": {"choose": 7}, "b": {"choose": 29}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 600)  # several shards
        for name, size in SIZES.items():
            records = [{"id": f"{name}{i}", "type": "", "conversation": TALK, "images": []} for i in range(size)]
            ensure_shards(folder / name, lambda records=records: records, size)
            assert len(list((folder / name).glob("*.mds"))) > 2
    return folder


def run_script(root: Path, *specs: Any) -> Any:
    """Run `resume_script.py` in a new process and return its output: streaming frees shared memory only at exit."""
    command = [sys.executable, str(SCRIPT), str(root), *map(json.dumps, specs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CASES = [*((name, 0) for name in WEIGHTS), ("one", 2), ("two repeats", 2)]
DEFAULT = ("two repeats", 2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("weights", "workers"), [case if case == DEFAULT else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_new_process_resumes_at_the_saved_state(root: Path, weights: str, workers: int) -> None:
    spec = {"weights": WEIGHTS[weights], "workers": workers}
    order, states = run_script(root, spec)
    assert order[0] != order[1]
    total = len(order[0])
    assert total >= 3
    assert all(own in (composers, None) for own, composers in states.values())  # so testing Composer's is enough
    positions = [(1, 0), (1, 2), (1, total), (2, 1)]
    chosen = [states[f"{epoch} {number}"][1] for epoch, number in positions]
    rest, _ = run_script(root, spec, chosen)
    for (epoch, number), batches in zip(positions, rest, strict=True):
        assert batches == [order[epoch][number:], order[epoch + 1]], (epoch, number)


def test_weights_determine_the_samples_of_an_epoch(root: Path) -> None:
    spec = {"weights": {"a": {"choose": 8}, "b": {"repeat": 2}}, "workers": 0}  # 34 samples
    for epoch in run_script(root, spec)[0]:
        names = [name for batch in epoch for name in batch]
        from_a = [name for name in names if name.startswith("a")]
        assert len(names) == 34
        assert len(from_a) == len(set(from_a)) == 8
        assert max(names.count(f"b{i}") for i in range(13)) == 2
