"""Resuming goes on at the sample, past the first epoch too, however streams are weighted (streaming#869)."""

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
    "one repeated up": {"a": {"repeat": 1.7}},
    "one repeated down": {"a": {"repeat": 0.6}},
    "one chosen up": {"a": {"choose": 33}},
    "one chosen down": {"a": {"choose": 13}},
    "two": {"a": {}, "b": {}},
    "two proportions": {"a": {"proportion": 0.25}, "b": {"proportion": 0.75}},
    "two repeated": {"a": {"repeat": 0.5}, "b": {"repeat": 2.3}},
    "two chosen": {"a": {"choose": 7}, "b": {"choose": 29}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 600)  # some samples each
        for name, size in SIZES.items():
            records = [{"id": f"{name}{i}", "type": "", "conversation": TALK, "images": []} for i in range(size)]
            ensure_shards(folder / name, lambda records=records: records, size)
            assert len(list((folder / name).glob("*.mds"))) > 2
    return folder


def ask(root: Path, *specs: Any) -> Any:
    """What a process of its own says: streaming leaves its shared memory open until a process ends."""
    command = [sys.executable, str(SCRIPT), str(root), *map(json.dumps, specs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CASES = [*((name, 0) for name in WEIGHTS), ("one", 2), ("two repeated", 2)]
OFTEN = ("two repeated", 2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("weights", "workers"), [case if case == OFTEN else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_new_process_goes_on_where_the_state_was_taken(root: Path, weights: str, workers: int) -> None:
    spec = {"weights": WEIGHTS[weights], "workers": workers}
    order, states = ask(root, spec)
    assert order[0] != order[1]
    whole = len(order[0])
    assert whole >= 3
    assert all(own in (composers, None) for own, composers in states.values())  # so that one of them is enough
    places = [(1, 0), (1, 2), (1, whole), (2, 1)]
    chosen = [states[f"{epoch} {number}"][1] for epoch, number in places]
    rest, _ = ask(root, spec, chosen)
    for (epoch, number), found in zip(places, rest, strict=True):
        assert found == [order[epoch][number:], order[epoch + 1]], (epoch, number)


def test_an_epoch_has_what_the_weights_say(root: Path) -> None:
    spec = {"weights": {"a": {"choose": 8}, "b": {"repeat": 2}}, "workers": 0}  # 34 samples
    for epoch in ask(root, spec)[0]:
        found = [name for batch in epoch for name in batch]
        from_a = [name for name in found if name.startswith("a")]
        assert len(found) == 34
        assert len(from_a) == len(set(from_a)) == 8
        assert max(found.count(f"b{i}") for i in range(13)) == 2
