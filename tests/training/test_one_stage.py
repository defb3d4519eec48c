"""One stage per launch, and stages that start from other weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ssmvl
from ssmvl.errors import CheckpointError, RecipeError, RunError

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming emit warnings


def weights(run: str) -> bytes:
    return Path(f"runs/{run}/model/model.safetensors").read_bytes()


@pytest.mark.long
def test_stages_in_two_launches_give_the_weights_of_one_launch(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ssmvl.train(tiny, "run=both")
    ssmvl.train(tiny, "stage=align")
    assert not Path("runs/tiny/model").exists()
    assert not Path("runs/tiny/results.json").exists()
    capfd.readouterr()
    ssmvl.train(tiny, "stage=finetune")
    output = capfd.readouterr().out
    assert "stage finetune: started" in output
    assert "align" not in output
    assert Path("runs/tiny/results.json").is_file()
    assert weights("tiny") == weights("both")
    elsewhere = Path(shutil.copytree("runs/both/align/model", "elsewhere"))
    ssmvl.train(tiny, "run=other", "stage=finetune", f"stages.finetune.init_from={elsewhere}", "evaluation=null")
    assert weights("other") == weights("both")
    with pytest.raises(RunError, match=r"stages\.finetune\.init_from: was 'elsewhere', is now 'recipe'"):
        ssmvl.train(tiny, "run=other", "stage=finetune", "stages.finetune.init_from=recipe", "evaluation=null")


def test_a_stage_whose_previous_model_is_missing(tiny: Path) -> None:
    with pytest.raises(
        RunError, match=r"runs/tiny/align/model does not exist; train that stage first, or set stages\.fin"
    ):
        ssmvl.train(tiny, "stage=finetune")
    assert not Path("runs").exists()


def test_weights_that_are_missing_or_do_not_fit_are_found_before_the_first_stage(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        ssmvl.train(tiny, "stages.finetune.init_from=./nowhere")
    torch.save({"a": torch.zeros(1)}, "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: no registered layout recognizes"):
        ssmvl.train(tiny, "stages.finetune.init_from=a.pt")
    assert not Path("runs").exists()


def test_an_unknown_stage(tiny: Path) -> None:
    with pytest.raises(RecipeError, match=r"stage: unknown stage 'finetun'\. Did you mean 'finetune'\?"):
        ssmvl.train(tiny, "stage=finetun")
