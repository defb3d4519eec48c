"""Recipes with one mistake each: `check` reports its path and what is allowed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ssmvl.checkpoints import write_tensors
from ssmvl.errors import RecipeError
from ssmvl.recipes.merge import load_recipe
from ssmvl.training.checked import check

EVALUATED = "stages.align.evaluation={data: digit_scenes}"
STOPPER = "stages.align.callbacks.EarlyStopper="
BROKEN: list[tuple[list[str], str, str]] = [
    # Names
    (["stages.algin=null"], "stages.algin", r"unknown stage 'algin'\. Did you mean 'align'\?"),
    (["model.encoders.fien=null"], "model.encoders.fien", r"unknown encoder 'fien'\. Did you mean 'fine'\?"),
    (["stages={}"], "stages", "an empty one changes nothing; to remove an entry, set it to null"),
    (["model.encoders={}"], "model.encoders", "an empty one changes nothing"),
    (["stages.finetun.batch=4"], "stages.finetun.batch", r"unknown stage 'finetun'\. Did you mean 'finetune'\?"),
    (["model.encoders.corse.stem=fine"], "model.encoders.corse.stem", r"Did you mean 'coarse'\?"),
    (["stage=finetun"], "stage", r"unknown stage 'finetun'\. Did you mean 'finetune'\?"),
    (["stages.order=[align]"], "stages.order", "must name each stage once"),
    (["model.connector={name:mlp}"], "model.connector", "put a space after the ':' of a mapping"),
    (["model.connector.scan_order=hilbrt"], "model.connector.scan_order", "unknown scan_order 'hilbrt'"),
    (["model.language.mixer=mamba3"], "model.language.mixer", "unknown mixer 'mamba3'"),
    (["modle.connector=mlp"], "modle", r"Did you mean 'model'\?"),
    (["stages.align.optimzer.lr=1"], "stages.align.optimzer", r"Did you mean 'optimizer'\?"),
    (["stages.align.train=[conector]"], "stages.align.train", r"Did you mean 'connector'\?"),
    ([f"run={'x' * 300}"], "run", "a name of letters, digits, _ and -, 100 at most"),
    (["run=a/b"], "run", "a name of letters"),
    # Text that is not text, and numbers that cannot be right
    (["run=1e3"], "run", r"expected text, received 1000\.0 \(float\); put it in quotes"),
    (["run=true"], "run", r"expected text, received True \(bool\); put it in quotes"),
    (["stages.align.train=[true]"], "stages.align.train", r"expected text, received True \(bool\)"),
    (["stages.align.batch=010a"], "stages.align.batch", "expected int"),
    (["stages.align.duration=600sec"], "stages.align.duration", r"an integer and a unit \(ba, ep, sp, tok\)"),
    (["stages.align.duration=1000000000000000ep"], "stages.align.duration", "an integer and a unit"),
    (["stages.align.checkpoint=0ba"], "stages.align.checkpoint", "an integer and a unit"),
    (["stages.align.warmup=251ba"], "stages.align.warmup", "'251ba' is longer than the stage's duration, '250ba'"),
    (["stages.align.warmup=1.5dur"], "stages.align.warmup", "'1.5dur' is longer than the stage's duration"),
    (
        ["stages.align.warmup=100sp"],
        "stages.align.warmup",
        "must be in dur or in the unit of the stage's duration, '250ba'",
    ),
    (["stages.align.microbatch=65"], "stages.align.microbatch", "65 is larger than the batch of 64 samples"),
    (["stages.align.optimizer.lr=1e300"], "stages.align.optimizer.lr", r"must be from 0 to 10, received 1e\+300"),
    (["stages.align.optimizer.lr=.nan"], "stages.align.optimizer.lr", "must be from 0 to 10"),
    (["stages.align.loader.workers=100000"], "stages.align.loader.workers", "must be from 0 to 256"),
    (["stages.align.max_text_tokens=100000000000"], "stages.align.max_text_tokens", r"must be from 1 to 10\^9"),
    (["model.language.num_layers=100000"], "model.language.num_layers", "must be from 1 to 256"),
    (["seed=-1"], "seed", r"from 0 to 2\^32 - 1"),
    # Files
    (["model.language.weights=/nowhere"], "model.language.weights", "/nowhere: no such file or directory"),
    (["model.encoders.fine.weights=/nowhere"], "model.encoders.fine.weights", "/nowhere: no such file or directory"),
    (["stages.align.init_from=./no/pe"], "stages.align.init_from", r"\./no/pe: no such file or directory"),
    (["model.tokenizer=/nowhere"], "model.tokenizer", "/nowhere: no such file or directory"),
    # Composer's classes
    (["stages.align.callbacks={EarlyStoper: {}}"], "stages.align.callbacks.EarlyStoper", "Did you mean 'EarlyStopper'"),
    (["stages.align.callbacks={Generate: {}}"], "stages.align.callbacks.Generate", "needs a transformers model"),
    (["stages.align.loggers={MosaicMLLogger: {}}"], "stages.align.loggers.MosaicMLLogger", "MosaicML platform only"),
    (
        [EVALUATED, f"{STOPPER}{{monitor: evaluation/los, dataloader_label: evaluation}}"],
        "stages.align.callbacks.EarlyStopper.monitor",
        "unknown metric 'evaluation/los'; allowed: evaluation/loss",
    ),
    (
        [EVALUATED, f"{STOPPER}{{monitor: evaluation/loss, dataloader_label: eval}}"],
        "stages.align.callbacks.EarlyStopper.dataloader_label",
        "received 'eval', allowed: 'evaluation'",
    ),
    (
        [f"{STOPPER}{{monitor: evaluation/loss, dataloader_label: evaluation}}"],
        "stages.align.callbacks.EarlyStopper",
        "needs the stage's key evaluation",
    ),
]


@pytest.mark.parametrize(("overrides", "path", "why"), BROKEN, ids=[overrides[-1][:60] for overrides, _, _ in BROKEN])
def test_a_broken_recipe_is_rejected_with_the_path_of_its_mistake(overrides: list[str], path: str, why: str) -> None:
    with pytest.raises(RecipeError) as error:
        check("quickstart", *overrides)
    (problem,) = error.value.problems
    assert problem.path == path
    assert re.search(why, problem.message), problem.message


def test_weights_that_do_not_fit_are_found_by_the_check(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"language.embedding.weight": torch.zeros(2, 2)})
    with pytest.raises(RecipeError) as error:
        check("quickstart", f"stages.finetune.init_from={path}")
    (problem,) = error.value.problems
    assert problem.path == "stages.finetune.init_from"
    assert "does not fit the model" in problem.message


@pytest.mark.parametrize("text", ["yes", "010", "1:30", "0x1F", "1_000", "off", "2026-11-30", "17"])
def test_text_stays_text(text: str) -> None:
    recipe = load_recipe("quickstart", f"model.tokenizer={text}")
    with pytest.raises(RecipeError, match=f"cannot load the tokenizer: {text}: "):
        check(recipe)


def test_yaml_1_1_scalars_are_numbers_and_booleans_where_those_are_expected() -> None:
    plan = check("quickstart", "stages.align.packed=off", "stages.align.batch=0_064").plan
    assert (plan.stages["align"].packed, plan.stages["align"].batch) == (False, 64)
