"""One stage of several in a launch of its own, and stages that start from weights of somebody else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ssmvl
from ssmvl.errors import CheckpointError, RecipeError, RunError

pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming warn on their own account


def weights(run: str) -> bytes:
    return Path(f"runs/{run}/model/model.safetensors").read_bytes()


@pytest.mark.long
def test_stages_of_two_launches_leave_what_those_of_one_do(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ssmvl.train(tiny, "run=whole")
    ssmvl.train(tiny, "stage=align")
    assert not Path("runs/tiny/model").exists()
    assert not Path("runs/tiny/results.json").exists()
    capfd.readouterr()
    ssmvl.train(tiny, "stage=finetune")
    said = capfd.readouterr().out
    assert "stage finetune: started" in said
    assert "align" not in said
    assert Path("runs/tiny/results.json").is_file()
    assert weights("tiny") == weights("whole")
    elsewhere = Path(shutil.copytree("runs/whole/align/model", "elsewhere"))
    ssmvl.train(tiny, "run=other", "stage=finetune", f"stages.finetune.init_from={elsewhere}", "evaluation=null")
    assert weights("other") == weights("whole")
    with pytest.raises(RunError, match=r"stages\.finetune\.init_from: 'elsewhere' there, 'recipe' here"):
        ssmvl.train(tiny, "run=other", "stage=finetune", "stages.finetune.init_from=recipe", "evaluation=null")


def test_a_stage_whose_start_is_not_there(tiny: Path) -> None:
    with pytest.raises(
        RunError, match=r"runs/tiny/align/model is not there; train that stage first, or give stages\.fin"
    ):
        ssmvl.train(tiny, "stage=finetune")
    assert not Path("runs").exists()


def test_weights_that_are_not_there_or_do_not_fit_are_found_before_the_first_stage(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        ssmvl.train(tiny, "stages.finetune.init_from=./nowhere")
    torch.save({"a": torch.zeros(1)}, "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: no registered layout recognizes"):
        ssmvl.train(tiny, "stages.finetune.init_from=a.pt")
    assert not Path("runs").exists()


def test_a_stage_that_is_none(tiny: Path) -> None:
    with pytest.raises(RecipeError, match=r"stage: 'finetun' is not a stage of this recipe.*Did you mean 'finetune'\?"):
        ssmvl.train(tiny, "stage=finetun")
