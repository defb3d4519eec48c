"""Class names by which Composer restores state: a renamed class would lose its state with only a warning."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from composer import Algorithm, Callback, Trainer

import ssmvl
from ssmvl import training

OURS = {
    "AnswerAccuracy",
    "DamagedSamples",
    "GradientClipping",
    "Identity",
    "Interruption",
    "LossGuard",
    "Norms",
    "OldCheckpoints",
    "Pace",
    "ProgressBar",
    "StageEvaluator",
    "UnusedParameters",
}
COMPOSERS = {
    "CheckpointSaver",
    "LRMonitor",
    "RuntimeEstimator",
    "SpeedMonitor",
    "TensorboardLogger",
}


def test_our_classes_keep_their_names() -> None:
    modules = [
        importlib.import_module(module.name) for module in pkgutil.walk_packages(training.__path__, "ssmvl.training.")
    ]
    names = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, (Callback, Algorithm)) and value.__module__ == module.__name__
    }
    assert names == OURS


def test_a_checkpoint_has_state_under_these_names(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[dict[str, Any]] = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer: states.append(trainer.state.state_dict()))
    questions = "stages.align.evaluation.data={name: digit_scenes, test_size: 10}"
    ssmvl.train(tiny, "stage=align", "stages.align.train=[encoders, connector, language]", questions)
    (state,) = states
    algorithms = {name for name, _ in state["algorithms"]}
    assert state["callbacks"].keys() | algorithms == OURS | COMPOSERS
    assert state["optimizers"].keys() == {"AdamW"}
    assert state["schedulers"].keys() == {"LambdaLR"}
    assert {name.partition(".")[0] for name in state["model"]} == {"model"}
