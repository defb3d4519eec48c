"""Plans against what the system says that a step of Composer's Trainer held, in fp32 on the CPU."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from composer import Callback, DataSpec, Trainer
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from ranks import two_ranks
from torch.utils.data import DataLoader

import ssmvl
from ssmvl.processing.batch import collate, num_samples, num_tokens, split_batch
from ssmvl.recipes.merge import Recipe
from ssmvl.training.checked import check
from ssmvl.training.composer_model import ComposerVLM
from ssmvl.training.optimizer import adamw
from ssmvl.training.planning.plan import StagePlan
from ssmvl.training.schema import Stage

pytestmark = pytest.mark.filterwarnings("default")  # Composer and torch.distributed warn on their own account
TEXT = 96  # tokens of a sample
STAGE = ("stages.align=null", "stages.order=null", f"stages.finetune.max_text_tokens={TEXT}")
ONE_BLOCK = 64 * 2**10  # bytes from which freed memory goes back to the system, so that resident is what is held
M_MMAP_THRESHOLD = -3  # of malloc.h


class Peak(Callback):
    """The most that this process had resident during a step."""

    found = 0

    def batch_start(self, state: object, logger: object) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now

    def batch_end(self, state: object, logger: object) -> None:
        self.found = resident("VmHWM")


def resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def step(recipe: Recipe, stage: Stage, steps: int = 3) -> int:
    """Bytes at the peak of the last of three steps: from the third on, DDP has the buckets that it stays with."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    model = ssmvl.build_model(recipe)
    places = torch.full((model.tokens_per_image,), -1)
    text = torch.arange(TEXT)
    sample = {
        "ids": torch.cat([places, text]),
        "labels": torch.cat([torch.full_like(places, -100), text]),
        "images": {s: torch.zeros(1, 3, s.size, s.size, dtype=torch.uint8) for s in model.image_specs},
    }
    data = [sample] * (steps * stage.batch)
    vlm = ComposerVLM(model, stage.train, stage.packed, 1, stage.activation_checkpointing)
    peak, sharded = Peak(), world > 1 and stage.sharding == "fsdp2"
    trainer = Trainer(
        model=vlm,
        optimizers=adamw(vlm, stage.optimizer),
        train_dataloader=DataSpec(
            DataLoader(data, stage.batch // world, sampler=dist.get_sampler(data), collate_fn=collate),
            split_batch=split_batch,
            get_num_samples_in_batch=num_samples,
            get_num_tokens_in_batch=num_tokens,
        ),
        max_duration=f"{steps}ba",
        device_train_microbatch_size=stage.microbatch or stage.batch // world,
        parallelism_config={"fsdp": FSDP2Config(mixed_precision="FULL")} if sharded else None,
        callbacks=[peak],
        progress_bar=False,
    )
    del model
    trainer.fit()
    return peak.found


def measure(runs: Sequence[tuple[str, ...]]) -> None:
    """Print, for each, the bytes that a step held beyond what a small one left."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, ONE_BLOCK)
    for overrides in (SMALL, *runs):
        recipe = ssmvl.load_recipe("quickstart", *STAGE, *overrides)
        stage = check(recipe, weights=False).plan.stages["finetune"]
        gc.collect()
        libc.malloc_trim(0)
        before = resident("VmRSS")
        most = step(recipe, stage)
        gc.collect()
        print("bytes:", most - before)


def planned(overrides: tuple[str, ...], gpus: int) -> int:
    recipe = ssmvl.load_recipe("quickstart", *STAGE, *overrides)
    model = ssmvl.build_model(recipe, device="meta")
    return StagePlan(model, check(recipe).plan.stages["finetune"], gpus, on_gpu=False).memory().total()


def assert_near_the_plan(said: str, runs: Sequence[tuple[str, ...]], gpus: int) -> None:
    found = [int(size) for size in re.findall(r"bytes: (\d+)", said)][1:]
    assert found == [pytest.approx(planned(overrides, gpus), rel=0.15) for overrides in runs]


CHECKPOINTING = "stages.finetune.activation_checkpointing=true"
SMALL = ("stages.finetune.batch=2", "model.language.num_layers=1")
LARGE = ("model.language.width=512", "model.language.num_layers=5")
ONE_RANK = [(*LARGE, "stages.finetune.batch=8"), (*LARGE, "stages.finetune.batch=8", CHECKPOINTING)]
TWO_RANKS = [(*LARGE, "stages.finetune.batch=16"), (*LARGE, "stages.finetune.batch=16", CHECKPOINTING)]
MORE_ON_ONE = [
    (*LARGE, "stages.finetune.batch=8", "stages.finetune.microbatch=4"),
    (*LARGE, "stages.finetune.batch=8", "stages.finetune.packed=true"),
    (*LARGE, "stages.finetune.batch=16", "stages.finetune.microbatch=8", CHECKPOINTING),
]
MORE_ON_TWO = [
    (*LARGE, "stages.finetune.batch=32", "stages.finetune.microbatch=8", CHECKPOINTING),
    (*LARGE, "stages.finetune.batch=16", "stages.finetune.sharding=ddp"),
]


@pytest.mark.long
@pytest.mark.parametrize("runs", [ONE_RANK, pytest.param(MORE_ON_ONE, marks=pytest.mark.slow)])
def test_one_rank_holds_what_is_planned(runs: Sequence[tuple[str, ...]], tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    torch.multiprocessing.spawn(measure_alone, (runs, output))
    assert_near_the_plan(output.read_text(), runs, gpus=1)


def measure_alone(_: int, runs: Sequence[tuple[str, ...]], output: Path) -> None:
    """Run `measure` in a new process: the heap of a forked one has gaps where the tests before it freed memory."""
    torch.set_num_threads(1)
    with output.open("w") as file, redirect_stdout(file):
        measure(runs)


@pytest.mark.slow
@pytest.mark.parametrize("runs", [TWO_RANKS, MORE_ON_TWO])
def test_each_of_two_ranks_holds_what_is_planned(runs: Sequence[tuple[str, ...]], tmp_path: Path) -> None:
    for said in two_ranks(lambda: measure(runs), tmp_path):
        assert_near_the_plan(said, runs, gpus=2)
