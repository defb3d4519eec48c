"""Twenty steps give the same weights however a batch is split, sharded, packed or checkpointed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ssmvl
from ssmvl.checkpoints import read_tensors

pytestmark = pytest.mark.filterwarnings("default")  # Composer, streaming and torch.distributed emit warnings
ONE_STAGE = (
    "stages.align=null",
    "stages.order=null",
    "stages.finetune.duration=20ba",
    "stages.finetune.batch=4",
    "stages.finetune.checkpoint=20ba",
    "stages.finetune.optimizer.lr=1e-4",
    "evaluation=null",
)
CHECKPOINTING = "stages.finetune.activation_checkpointing=true"
ONE_RANK = {
    "baseline": (),
    "micro": ("stages.finetune.microbatch=1",),
    "packed": ("stages.finetune.packed=true",),
    "checkpointing": (CHECKPOINTING, "stages.finetune.microbatch=3"),
}
TWO_RANKS = {
    "ddp": ("stages.finetune.sharding=ddp",),
    "fsdp2": (CHECKPOINTING, "stages.finetune.microbatch=1", "stages.finetune.packed=true"),
}


def logged(run: str) -> dict[str, list[float]]:
    accumulator = EventAccumulator(f"runs/{run}/tensorboard/{run}-finetune")
    accumulator.Reload()
    names = [name for name in accumulator.Tags()["scalars"] if name.startswith(("loss/train/total", "norm/"))]
    # Events of several files, so not in order of steps.
    by_step = {name: sorted(accumulator.Scalars(name), key=lambda event: event.step) for name in names}
    return {name: [event.value for event in events] for name, events in by_step.items()}


@pytest.mark.long
def test_twenty_steps_give_the_same_weights(tiny: Path) -> None:
    def train(runs: dict[str, tuple[str, ...]]) -> None:
        for run, options in runs.items():
            ssmvl.train(tiny, f"run={run}", *ONE_STAGE, *options)

    two_ranks(lambda: train(TWO_RANKS), tiny.parent)
    train(ONE_RANK)
    expected, weights = logged("baseline"), read_tensors(Path("runs/baseline/model/model.safetensors"))[0]
    assert len(expected["loss/train/total"]) == 20
    for run in [*ONE_RANK, *TWO_RANKS]:
        actual = logged(run)
        assert actual.keys() == expected.keys()
        for name, values in actual.items():
            assert values == pytest.approx(expected[name], rel=1e-5 if "loss" in name else 1e-4), (run, name)
        tensors = read_tensors(Path(f"runs/{run}/model/model.safetensors"))[0]
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=1e-5, msg=f"{run}: {name}")
