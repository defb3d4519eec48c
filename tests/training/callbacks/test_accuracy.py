"""Training accuracy, by type of question."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from composer import Logger, State

import ssmvl
from ssmvl.drawing.training_curves import read_scalars
from ssmvl.processing.batch import collate
from ssmvl.training.callbacks.accuracy import WINDOW, AnswerAccuracy

pytestmark = pytest.mark.filterwarnings("default")  # Composer warns at import


class Recorder:
    """A logger that records metrics."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.logged.append(metrics)


def state(types: list[str], correct: list[list[bool]], batch: int) -> State:
    """State after a micro-batch whose answers have these correct and wrong tokens."""
    samples = [
        {"ids": torch.zeros(len(r) + 1), "labels": torch.tensor([-100] + [1] * len(r)), "images": {"": torch.zeros(0)}}
        for r in correct
    ]
    flat = torch.tensor([token for answer in correct for token in answer])
    logits = torch.nn.functional.one_hot(flat.long(), 3).float()  # the most likely token is 1 if correct, else 0
    return cast(
        State,
        SimpleNamespace(
            outputs={"logits": logits, "labels": torch.ones(len(flat), dtype=torch.long)},
            batch=collate([{**s, "type": t} for s, t in zip(samples, types, strict=True)]),
            timestamp=SimpleNamespace(batch=SimpleNamespace(value=batch)),
        ),
    )


def run(steps: list[tuple[list[str], list[list[bool]]]]) -> list[dict[str, float]]:
    callback, recorder = AnswerAccuracy(), Recorder()
    for number, (types, correct) in enumerate(steps, start=1):
        current = state(types, correct, number)
        callback.after_loss(current, cast(Logger, recorder))
        callback.batch_end(current, cast(Logger, recorder))
    return recorder.logged


def test_an_answer_is_correct_if_all_its_tokens_are() -> None:
    step = (["a", "a", "b", "a"], [[True], [True, False], [True, True], [False]])
    assert run([step] * WINDOW) == [{"accuracy/a": 1 / 3, "accuracy/b": 1.0}]


def test_windows_are_counted_separately() -> None:
    correct, wrong = (["a"], [[True]]), (["a"], [[False]])
    logged = run([correct] * WINDOW + [wrong] * (WINDOW - 1) + [correct])
    assert logged == [{"accuracy/a": 1.0}, {"accuracy/a": 1 / WINDOW}]


def test_nothing_is_logged_within_a_window() -> None:
    assert run([(["a"], [[True]])] * (WINDOW - 1)) == []


def test_questions_without_a_type() -> None:
    assert run([([""], [[True]])] * WINDOW) == [{"accuracy/all": 1.0}]


@pytest.mark.long
def test_a_run_logs_accuracy(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmvl.training.callbacks.accuracy.WINDOW", 2)
    folder = ssmvl.train(tiny, "stages.finetune.microbatch=3")
    logged: dict[str, Any] = read_scalars(folder / "tensorboard" / "tiny-finetune")
    curves = {name: curve for name, curve in logged.items() if name.startswith("accuracy/")}
    assert curves
    assert {step for curve in curves.values() for step in curve} <= {1, 2, 3, 4}
    assert all(0 <= value <= 1 for curve in curves.values() for value in curve.values())
