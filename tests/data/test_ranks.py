"""Epochs over several ranks contain every sample once, in a reproducible order. Real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ssmvl.data import shards
from ssmvl.data.shards import ensure_shards

SCRIPT = Path(__file__).with_name("ranks_script.py")
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
DAMAGED = 7


def write(folder: Path, size: int) -> Path:
    """Write several shards. One sample has no supervised token."""
    talks = [TALK[:1] if i == DAMAGED else TALK for i in range(size)]
    records = [{"id": str(i), "type": "", "conversation": talk, "images": []} for i, talk in enumerate(talks)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 600)
        ensure_shards(folder, lambda: records, size)
    return folder


def run(folder: Path, out: Path, world: int, batch: int, workers: int) -> list[Any]:
    """Return two epochs of each rank: (ids of each batch, ids of damaged samples)."""
    out.mkdir()
    spec = json.dumps({"world": world, "batch": batch, "workers": workers})
    command = [sys.executable, str(SCRIPT), str(folder), str(out), spec]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_sample_is_seen_once_and_the_damaged_one_is_named(tmp_path: Path, world: int) -> None:
    folder = write(tmp_path / "shards", 48)
    ranks = run(folder, tmp_path / "out", world, batch=4, workers=0)
    for epoch in range(2):
        names = [name for rank in ranks for batch in rank[epoch][0] for name in batch]
        damaged = [name for rank in ranks for name in rank[epoch][1]]
        assert damaged == [str(DAMAGED)]
        count = Counter(names)
        assert count.pop(str(DAMAGED + 1)) == 2  # replaces the damaged one
        assert count == {str(i): 1 for i in range(48) if i not in (DAMAGED, DAMAGED + 1)}


@pytest.mark.long
def test_as_few_samples_as_possible_are_repeated_if_ranks_cannot_share_them_evenly(tmp_path: Path) -> None:
    """With 46 samples, each of 4 ranks reads 12, so two samples are repeated, as streaming documents."""
    ranks = run(write(tmp_path / "shards", 46), tmp_path / "out", 4, batch=4, workers=0)
    count = Counter(name for rank in ranks for batch in rank[0][0] for name in batch)
    count[str(DAMAGED)] += 1
    count[str(DAMAGED + 1)] -= 1
    assert sum(count.values()) == 48
    assert count.keys() == {str(i) for i in range(46)}
    assert max(count.values()) <= 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_order_with_any_number_of_workers(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", 48)
    first = run(folder, tmp_path / "first", 2, batch=4, workers=0)
    assert run(folder, tmp_path / "again", 2, batch=4, workers=0) == first
    assert run(folder, tmp_path / "workers", 2, batch=4, workers=2) == first
    assert first[0][0] != first[0][1]
