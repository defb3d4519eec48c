"""What a run looks for before it builds anything."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hub import Hub

import ssmvl
from ssmvl.errors import ContractError, DataError, SsmvlError
from ssmvl.recipe import load_recipe
from ssmvl.text.tokenizers import byte_tokenizer
from ssmvl.training.session import Session
from ssmvl.training.stages import check

BIG = "model.language.weights=owner/big"
pytestmark = pytest.mark.filterwarnings("default")  # Composer and streaming warn on their own account


def no_data(part: str) -> str:
    return f"{part}.data={{name: shards, folder: no_{part.rpartition('.')[2]}}}"


@pytest.mark.parametrize("part", ["stages.align", "stages.finetune", "evaluation"])
def test_data_that_is_nowhere_is_missed_before_weights_are_fetched(tiny: Path, hub: Hub, part: str) -> None:
    for seed in (0, 1):  # the run that failed keeps its name from nobody
        with pytest.raises(DataError, match=rf"no_{part.rpartition('.')[2]}/\w+/index\.json: there is no such file"):
            ssmvl.train(tiny, BIG, no_data(part), f"seed={seed}")
    assert hub.requests == []


def test_data_of_a_finished_stage_is_not_looked_for(tiny: Path) -> None:
    left = Path("runs/tiny/align/model")
    left.mkdir(parents=True)
    (left / "ssmvl.json").touch()
    with pytest.raises(DataError, match="no_finetune"):
        ssmvl.train(tiny, no_data("stages.align"), no_data("stages.finetune"))


def test_a_tokenizer_of_the_hub_is_fetched_and_compared_before_weights_are(tiny: Path, hub: Hub) -> None:
    folder = hub.model("owner/lm")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    with pytest.raises(ContractError, match="tokenizer 'owner/lm' has 257 ids"):
        ssmvl.train(tiny, BIG, "model.tokenizer=owner/lm")
    assert not [request for request in hub.requests if "owner/big" in request]


def test_what_the_first_rank_misses_ends_both(tiny: Path) -> None:
    torch.multiprocessing.start_processes(prepare, (tiny,), nprocs=2, start_method="fork")  # Composer is imported once
    missing = "no_align/train/index.json: there is no such file"
    said = [Path(f"rank{rank}").read_text() for rank in (0, 1)]
    assert said[0].startswith(f"DataError: {missing}")
    assert said[1].startswith(f"RunError: {missing}")


def prepare(rank: int, recipe: Path) -> None:
    """One of two ranks of a run, up to where they build; it leaves its error in a file."""
    torch.set_num_threads(1)  # those of the first process are not in this one
    store = torch.distributed.FileStore(str(recipe.with_name("store")), 2)
    limit = timedelta(seconds=30)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    found = load_recipe(recipe, no_data("stages.align"))
    with pytest.raises(SsmvlError) as caught:
        Session(found, check(found)[0])._prepare()
    Path(f"rank{rank}").write_text(f"{caught.type.__name__}: {caught.value}")
