"""Metrics, progress lines and profiles of a run."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from composer import Logger, State, Time
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ssmvl
from ssmvl.model import costs
from ssmvl.training import trainer
from ssmvl.training.callbacks import metrics, progress_bar

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming warn by themselves
ONE_STAGE = ("stages.align=null", "stages.order=null", "evaluation=null", "stages.finetune.duration=4ba")
PARTS = ("connector", "language")


def logged(run: str) -> dict[str, list[float]]:
    events = EventAccumulator(f"runs/{run}/tensorboard/{run}-finetune")
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.long
def test_metrics_progress_lines_and_traces(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for module in (metrics, progress_bar):
        monkeypatch.setattr(module, "WINDOW", 1)
    monkeypatch.setattr(trainer, "WINDOW", 1)
    ssmvl.train(tiny, *ONE_STAGE, "stages.finetune.duration=6ba", "stages.finetune.profile=true")
    scalars = logged("tiny")
    assert all(0 < share < 1 for share in scalars["time/waiting_for_data"])
    assert min(scalars["throughput/supervised_tokens_per_sec"]) > 0
    assert 0.1 < scalars["memory/process"][-1] < 10
    assert {"norm/weight/connector", "norm/gradient/language", "time/remaining_estimate"} <= scalars.keys()
    assert any(tag.startswith("lr-") for tag in scalars)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("finetune ")]
    assert [line.partition(":")[0] for line in lines] == [f"finetune {step}/6" for step in range(1, 7)]
    pace = r"[\d,]+ tokens/s, [\d,]+ supervised, \d\.\d\d GB, \d+% waiting for data, 00:00 left"
    shown = rf"finetune 6/6: loss \d\.\d{{4}}, {pace}"
    assert re.fullmatch(shown, lines[-1])
    (trace,) = Path("runs/tiny/finetune/traces").iterdir()
    assert any(event.get("name") == "aten::mm" for event in json.loads(trace.read_text())["traceEvents"])


def test_flops_are_those_of_the_batch(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(costs.StepFlops, "of", lambda self, *counts: calls.append(counts) or 10**9)
    ssmvl.train(
        tiny, *ONE_STAGE, "stages.finetune.duration=2ba", "stages.finetune.callbacks={SpeedMonitor: {window_size: 1}}"
    )
    assert len(calls) == 2 * len(set(calls))
    assert all(images == 8 and positions > 8 * 9 and 8 <= labels < positions for images, positions, labels in calls)
    scalars = logged("tiny")
    per_second = [flops * pace for flops, pace in zip([10**9], scalars["throughput/batches_per_sec"], strict=True)]
    assert scalars["throughput/flops_per_sec"] == pytest.approx(per_second, rel=1e-3)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_progress_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    state = SimpleNamespace(
        timestamp=SimpleNamespace(batch=Time.from_batch(0)), max_duration=Time.from_epoch(2), dataloader_len=5
    )
    bar = progress_bar.ProgressBar("align")
    bar.fit_start(cast(State, state), cast(Logger, None))
    for step in range(1, 4):
        state.timestamp.batch = Time.from_batch(step)
        bar.log_metrics({"loss/train/total": 1 / step, "throughput/device/mfu": 0.41, "other": 3.0})
        bar.batch_end(cast(State, state), cast(Logger, None))
    bar.fit_end(cast(State, state), cast(Logger, None))
    assert terminal.getvalue().endswith("|######              | align 3/10: loss 0.3333, MFU 41.0%\n")
    assert capsys.readouterr().out == ""


def test_the_gradient_norm_is_from_before_clipping(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "WINDOW", 1)
    clipped: list[float] = []
    batch_end = metrics.Pace.batch_end

    def record(self: metrics.Pace, state: object, logger: object) -> None:
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]  # type: ignore[attr-defined]
        clipped.append(float(torch.nn.utils.get_total_norm(gradients)))
        batch_end(self, state, logger)  # type: ignore[arg-type]

    monkeypatch.setattr(metrics.Pace, "batch_end", record)
    ssmvl.train(tiny, *ONE_STAGE)
    scalars = logged("tiny")
    totals = [sum(scalars[f"norm/gradient/{part}"][step] ** 2 for part in PARTS) ** 0.5 for step in range(4)]
    assert max(totals) > 1.1
    assert clipped == pytest.approx([min(total, 1.0) for total in totals], rel=1e-3)
