"""A loss that is no number, or jumps, ends a stage on every rank before a checkpoint is made of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from ranks import two_ranks

import ssmvl
from ssmvl.errors import RecipeError, RunError
from ssmvl.training import run
from ssmvl.training.callbacks import loss_guard
from ssmvl.training.composer_model import ComposerVLM

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming warn on their own account
ONE_STAGE = ("stages.align=null", "stages.order=null", "evaluation=null", "stages.finetune.duration=8ba")


def lr(value: float) -> str:
    return f"stages.finetune.optimizer.lr={value}"


@pytest.mark.long
def test_a_loss_that_is_no_number_ends_both_ranks(tiny: Path) -> None:
    def train() -> None:
        assert run.main(["tiny.yaml", *ONE_STAGE, lr(1e30)]) == 2

    for said in two_ranks(train, tiny.parent):
        error = said[said.index("error: ") :]
        step = int(error.removeprefix("error: step ").partition(":")[0])
        assert "the loss is nan; the samples of this step: train-" in error
        assert error.count("train-") == 8  # of both ranks
        assert "Traceback" not in said
    left = [path.name for path in Path("runs/tiny/finetune/checkpoints").glob("ep*")]
    assert left
    assert all(f"ba{step}" not in name for name in left)


@pytest.mark.long
def test_a_jump_ends_it_unless_any_is_allowed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_guard, "BEFORE", 2)
    loss, calls = ComposerVLM.loss, itertools.count()
    monkeypatch.setattr(ComposerVLM, "loss", lambda self, *given: loss(self, *given) + 9 * (next(calls) % 8 == 4))
    for first in (0, 4):  # of this launch, which goes on at the checkpoint of the fourth
        calls = itertools.count(first)
        with pytest.raises(RunError, match=r"step 5: the loss is 1\d\.\d+, at most 2 more than the largest of the 2 s"):
            ssmvl.train(tiny, *ONE_STAGE)
        assert not Path("runs/tiny/finetune/checkpoints/ep0-ba5-rank0.pt").exists()
    calls = itertools.count()
    ssmvl.train(tiny, *ONE_STAGE, "run=any", "stages.finetune.loss_jump=null")
    with pytest.raises(RecipeError, match=r"stages\.finetune\.loss_jump"):
        ssmvl.train(tiny, "stages.finetune.loss_jump=0")
