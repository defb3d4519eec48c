"""What a run logs: the same norms sharded or not, whatever the micro-batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ssmvl
from ssmvl.training import watching

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming warn on their own account
ONE_STAGE = ("stages.align=null", "stages.order=null", "evaluation=null", "stages.finetune.duration=4ba")
PARTS = ("connector", "language")


def logged(run: str) -> dict[str, list[float]]:
    events = EventAccumulator(f"runs/{run}/tensorboard/{run}-finetune")
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_norms_are_the_same_sharded_or_in_micro_batches(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "WINDOW", 1)
    ssmvl.train(tiny, *ONE_STAGE, "run=whole")
    ssmvl.train(tiny, *ONE_STAGE, "run=split", "stages.finetune.microbatch=3")
    two_ranks(lambda: ssmvl.train(tiny, *ONE_STAGE, "run=sharded"), tiny.parent)
    whole, split, sharded = (logged(run) for run in ("whole", "split", "sharded"))
    norms = [f"norm/{what}/{part}" for what in ("weight", "gradient") for part in PARTS]
    assert {tag for tag in whole if tag.startswith("norm/")} == set(norms)
    for tag in norms:
        assert len(whole[tag]) == 4
        assert split[tag] == pytest.approx(whole[tag], rel=1e-3)
        assert sharded[tag] == pytest.approx(whole[tag], rel=1e-3)
    for found in (whole, sharded):
        assert all(0 < share < 1 for share in found["time/waiting_for_data"])
        assert min(found["throughput/supervised_tokens_per_sec"]) > 0
        assert "time/remaining_estimate" in found
        assert any(tag.startswith("lr-") for tag in found)


def test_the_gradient_is_that_before_clipping(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "WINDOW", 1)
    seen: list[float] = []
    batch_end = watching.Pace.batch_end

    def look(self: watching.Pace, state: object, logger: object) -> None:
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]  # type: ignore[attr-defined]
        seen.append(float(torch.nn.utils.get_total_norm(gradients)))
        batch_end(self, state, logger)  # type: ignore[arg-type]

    monkeypatch.setattr(watching.Pace, "batch_end", look)
    ssmvl.train(tiny, *ONE_STAGE)
    found = logged("tiny")
    totals = [sum(found[f"norm/gradient/{part}"][step] ** 2 for part in PARTS) ** 0.5 for step in range(4)]
    assert max(totals) > 1.1
    assert seen == pytest.approx([min(total, 1.0) for total in totals], rel=1e-3)
