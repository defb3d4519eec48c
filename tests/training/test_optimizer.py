"""The learning-rate schedule: a cosine after a warmup, in every unit, that continues with another batch."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from composer import State, Time
from composer.core import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ssmvl
from ssmvl.errors import RecipeError
from ssmvl.training.optimizer import cosine_schedule

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming warn on their own account
EPOCH = 960  # samples


def rates(duration: str, warmup: str, batches: list[int]) -> list[float]:
    """The factor before each step of a run whose steps have these batches, until its duration is over."""
    time, found = Timestamp(), []
    limit: Time[Any] = Time.from_timestring(duration)
    for batch in batches:
        state = SimpleNamespace(timestamp=time, max_duration=limit, dataloader_len=EPOCH // batch)
        if time.get(limit.unit) >= limit:
            break
        found.append(cosine_schedule(warmup, batch)(cast(State, state)))
        time = time.to_next_batch(samples=batch, tokens=10 * batch)
        if time.sample_in_epoch.value == EPOCH:
            time = time.to_next_epoch()
    return found


def cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
    ("duration", "warmup", "share"),
    [
        ("40ba", "0ba", 0.0), ("40ba", "0.25dur", 0.25), ("40ba", "10ba", 0.25), ("40ba", "1ep", 0.375),
        ("960sp", "0.25dur", 0.25), ("960sp", "240sp", 0.25),
        ("9600tok", "0.25dur", 0.25), ("9600tok", "2400tok", 0.25),
        ("2ep", "0ba", 0.0), ("2ep", "0.25dur", 0.25), ("2ep", "1ep", 0.5), ("2ep", "6ba", 0.2),
    ],
)  # fmt: skip
def test_a_linear_warmup_and_a_cosine_to_zero(duration: str, warmup: str, share: float) -> None:
    batch = 64
    found = rates(duration, warmup, [batch] * 100)
    steps = {"ba": 40, "sp": 15, "tok": 15, "ep": 30}[duration.strip("0123456789")]
    first = int(share * steps) if duration.endswith("ba") and "dur" in warmup else share * steps
    expected = [at / first if at < first else cosine((at - first) / (steps - first)) for at in range(steps)]
    assert found == pytest.approx(expected, abs=1e-9)


@given(split=st.integers(0, 9), warmup=st.sampled_from(["0ba", "0.25dur", "1ep"]), other=st.sampled_from([16, 96, 192]))
def test_epochs_are_counted_in_samples_whatever_the_batch(split: int, warmup: str, other: int) -> None:
    changed = [32] * (6 * split) + [other] * 200
    found, sample = rates("2ep", warmup, changed), 0
    share = {"0ba": 0.0, "0.25dur": 0.25, "1ep": 0.5}[warmup]
    for rate, batch in zip(found, changed, strict=False):
        at = sample / (2 * EPOCH)
        assert rate == pytest.approx(at / share if at < share else cosine((at - share) / (1 - share)), abs=1e-9)
        sample += batch
    assert found[-1] < 0.1


@given(split=st.integers(4, 50), duration=st.sampled_from(["2ep", "60ba"]), warmup=st.sampled_from(["4ba", "1ep"]))
def test_no_unit_makes_the_rate_jump_where_the_batch_changes(split: int, duration: str, warmup: str) -> None:
    before = rates(duration, warmup, [32] * 100)
    after = rates(duration, warmup, [32] * split + [96] * 100)
    assert after[:split] == before[:split]
    if len(after) > split:
        assert after[split] == pytest.approx(before[split], abs=1e-9)


@pytest.mark.long
def test_a_run_resumed_with_another_batch_continues_its_schedule(tiny: Path) -> None:
    options = ("stages.align=null", "stages.order=null", "evaluation=null", "stages.finetune.duration=2ep")
    options += ("stages.finetune.warmup=0.25dur", "stages.finetune.keep=20", "stages.finetune.checkpoint=4ba")
    ssmvl.train(tiny, *options)  # 16 steps of 8 samples
    shutil.rmtree("runs/tiny/model")
    checkpoints = Path("runs/tiny/finetune/checkpoints")
    for path in checkpoints.iterdir():
        if int(path.name.split("ba")[1].split("-")[0]) > 8:
            path.unlink()
    shutil.rmtree("runs/tiny/tensorboard")
    ssmvl.train(tiny, *options, "stages.finetune.batch=16")
    events = EventAccumulator("runs/tiny/tensorboard/tiny-finetune")
    events.Reload()
    (name,) = [name for name in events.Tags()["scalars"] if name.startswith("lr-")]
    found = [event.value / 2e-3 for event in events.Scalars(name)]
    shares = [(samples / 128 - 0.25) / 0.75 for samples in range(64, 129, 16)]
    assert found == pytest.approx([cosine(share) for share in shares][: len(found)], abs=1e-3)
    assert len(found) >= 4


def test_a_duration_in_seconds_has_no_schedule(tiny: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.finetune\.duration.*'60sec'"):
        ssmvl.train(tiny, "stages.finetune.duration=60sec")
