"""Inputs that a run checks before it builds anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub import Hub
from ranks import two_ranks

import ssmvl
from ssmvl.errors import ContractError, DataError, SsmvlError
from ssmvl.processing.tokenizers import byte_tokenizer
from ssmvl.recipes.merge import load_recipe
from ssmvl.training.checked import check
from ssmvl.training.distributed import first_rank
from ssmvl.training.session import Session

BIG = "model.language.weights=owner/big"
pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming emit warnings


def no_data(part: str) -> str:
    return f"{part}.data={{name: shards, folder: no_{part.rpartition('.')[2]}}}"


@pytest.mark.parametrize("part", ["stages.align", "stages.finetune", "evaluation"])
def test_missing_data_is_reported_before_weights_are_downloaded(tiny: Path, hub: Hub, part: str) -> None:
    for seed in (0, 1):  # a run that failed leaves its name free
        with pytest.raises(DataError, match=rf"no_{part.rpartition('.')[2]}/\w+/index\.json does not exist"):
            ssmvl.train(tiny, BIG, no_data(part), f"seed={seed}")
    assert hub.requests == []


def test_data_of_a_finished_stage_is_not_opened(tiny: Path) -> None:
    model = Path("runs/tiny/align/model")
    model.mkdir(parents=True)
    (model / "ssmvl.json").touch()
    recipe = load_recipe(tiny, no_data("stages.align"), no_data("stages.finetune"))
    (model / "recipe.yaml").write_text(recipe.to_yaml())
    with pytest.raises(DataError, match="no_finetune"):
        ssmvl.train(recipe)


def test_a_tokenizer_on_the_hub_is_downloaded_and_compared_before_weights_are(tiny: Path, hub: Hub) -> None:
    folder = hub.model("owner/lm")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    with pytest.raises(ContractError, match="tokenizer 'owner/lm' has 257 ids"):
        ssmvl.train(tiny, BIG, "model.tokenizer=owner/lm")
    assert not [request for request in hub.requests if "owner/big" in request]


def test_data_missing_on_the_first_rank_ends_both(tiny: Path) -> None:
    recipe = load_recipe(tiny, no_data("stages.align"))

    def prepare() -> None:
        with pytest.raises(SsmvlError) as caught:
            first_rank(Session(check(recipe)).prepare)
        print(f"{caught.type.__name__}: {caught.value}", flush=True)

    missing = "no_align/train/index.json does not exist"
    outputs = two_ranks(prepare, tiny.parent)
    assert f"DataError: {missing}" in outputs[0]
    assert f"RunError: {missing}" in outputs[1]
