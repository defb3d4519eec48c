"""Non-finite losses, gradients or weights, and jumps of the loss, end a stage before a checkpoint is saved."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from composer.utils import dist
from ranks import two_ranks
from torch import Tensor, nn

import ssmvl
from ssmvl.checkpoints import read_tensors
from ssmvl.errors import RecipeError, RunError
from ssmvl.training import run
from ssmvl.training.callbacks import loss_guard
from ssmvl.training.composer_model import ComposerVLM
from ssmvl.training.optimizer import Optimizer, make_optimizer

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming warn by themselves
ONE_STAGE = ("stages.align=null", "stages.order=null", "evaluation=null", "stages.finetune.duration=8ba")


@pytest.mark.long
def test_a_loss_of_nan_ends_both_ranks(tiny: Path) -> None:
    def train() -> None:
        diverging = lambda model, options: make_optimizer(model, replace(options, lr=1e30))  # noqa: E731
        with patch("ssmvl.training.trainer.make_optimizer", diverging):
            assert run.main(["tiny.yaml", *ONE_STAGE]) == 2

    for output in two_ranks(train, tiny.parent):
        error = output[output.index("error: ") :]
        step = int(error.removeprefix("error: step ").partition(":")[0])
        assert "the gradient is not finite (norm nan); the samples of this step: train-" in error
        assert error.count("train-") == 8  # samples of both ranks
        assert "Traceback" not in output
    checkpoints = [path.name for path in Path("runs/tiny/finetune/checkpoints").glob("ep*")]
    assert checkpoints
    assert all(f"ba{step}" not in name for name in checkpoints)


@pytest.mark.long
def test_a_jump_of_the_loss_ends_the_stage_unless_any_is_allowed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_guard, "HISTORY", 2)
    loss, calls = ComposerVLM.loss, itertools.count()
    monkeypatch.setattr(ComposerVLM, "loss", lambda self, *inputs: loss(self, *inputs) + 9 * (next(calls) % 8 == 4))
    for first in (0, 4):  # steps before this launch; the second resumes after the fourth
        calls = itertools.count(first)
        expected = r"step 5: the loss is 1\d\.\d+; loss_jump allows at most 2 more than .* of the 2 preceding s"
        with pytest.raises(RunError, match=expected):
            ssmvl.train(tiny, *ONE_STAGE)
        assert not Path("runs/tiny/finetune/checkpoints/ep0-ba5-rank0.pt").exists()
    calls = itertools.count()
    ssmvl.train(tiny, *ONE_STAGE, "run=any", "stages.finetune.loss_jump=null")
    with pytest.raises(RecipeError, match=r"stages\.finetune\.loss_jump"):
        ssmvl.train(tiny, "stages.finetune.loss_jump=0")


def bad_gradients(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make backward overflow in these steps, counted from the launch, while the loss stays finite."""
    loss, calls = ComposerVLM.loss, itertools.count(1)

    def overflowing(self: ComposerVLM, *inputs: Any) -> Tensor:
        total = loss(self, *inputs) * 1.0
        if next(calls) in steps:
            total.register_hook(lambda gradient: gradient * float("inf"))
        return total

    monkeypatch.setattr(ComposerVLM, "loss", overflowing)


def finite(folder: str) -> bool:
    tensors, _ = read_tensors(f"{folder}/model.safetensors")
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Path("runs/tiny/finetune/checkpoints")
    with monkeypatch.context() as patch:
        bad_gradients(patch, 4)
        with pytest.raises(RunError, match=r"step 4: the gradient is not finite \(norm \w+\); .*: train-"):
            ssmvl.train(tiny, *ONE_STAGE)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["ep0-ba2-rank0.pt", "ep0-ba3-rank0.pt"]
    # a checkpoint that an older version saved after such a step
    latest = checkpoints / "ep0-ba3-rank0.pt"
    state = torch.load(latest, weights_only=False)
    state["state"]["model"]["model.language.norm_f.weight"][0] = float("nan")
    torch.save(state, latest)
    ssmvl.train(tiny, *ONE_STAGE)
    output = capfd.readouterr().out
    assert f"skipping a checkpoint: {latest} holds weights that are not finite: language.norm_f.weight" in output
    assert "resumed at step 2," in output
    assert finite("runs/tiny/model")


def test_consecutive_steps_are_skipped_up_to_a_limit(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        bad_gradients(patch, 2, 3, 6)
        ssmvl.train(tiny, *ONE_STAGE, "stages.finetune.max_skipped_steps=2")
    output = capfd.readouterr().out
    assert [line.partition(", skipped ")[2][:26] for line in output.splitlines() if ", skipped (" in line] == [
        "(1 of at most 2 in a row):", "(2 of at most 2 in a row):", "(1 of at most 2 in a row):",
    ]  # fmt: skip
    assert finite("runs/tiny/model")
    with monkeypatch.context() as patch:
        bad_gradients(patch, 2, 3, 4)
        with pytest.raises(RunError, match=r"step 4: the gradient is not finite .* max_skipped_steps"):
            ssmvl.train(tiny, *ONE_STAGE, "run=stopped", "stages.finetune.max_skipped_steps=2")


@pytest.mark.long
def test_both_sharded_ranks_skip_the_same_step(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> None:
        with monkeypatch.context() as patch:
            bad_gradients(patch, *([2] if dist.get_global_rank() else []))  # one rank's gradient reaches both
            ssmvl.train(tiny, *ONE_STAGE, "stages.finetune.max_skipped_steps=1")

    first, second = two_ranks(train, tiny.parent)
    assert "step 2: the gradient is not finite" in first
    assert "skipped (" not in second
    assert finite("runs/tiny/model")


def test_weights_that_are_not_finite_are_not_saved(tiny: Path) -> None:
    def overflowing(model: nn.Module, options: Optimizer) -> torch.optim.AdamW:
        return make_optimizer(model, replace(options, lr=1e30, weight_decay=1e10))

    with (
        patch("ssmvl.training.trainer.make_optimizer", overflowing),
        pytest.raises(RunError, match=r"step 1: the weights are not finite after this step, .*: train-"),
    ):
        ssmvl.train(tiny, *ONE_STAGE)
    assert not [*Path("runs/tiny/finetune/checkpoints").iterdir()]
