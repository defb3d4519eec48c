"""However a batch is cut, shared or kept in memory, twenty steps leave the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ssmvl
from ssmvl.checkpoints import read_tensors

pytestmark = pytest.mark.filterwarnings("default")  # Composer, streaming and torch.distributed warn on their own
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
    "whole": (),
    "micro": ("stages.finetune.microbatch=1",),
    "packed": ("stages.finetune.packed=true",),
    "checkpointing": (CHECKPOINTING, "stages.finetune.microbatch=3"),
}
TWO_RANKS = {
    "ddp": ("stages.finetune.sharding=ddp",),
    "fsdp2": (CHECKPOINTING, "stages.finetune.microbatch=1", "stages.finetune.packed=true"),
}


def logged(run: str) -> dict[str, list[float]]:
    events = EventAccumulator(f"runs/{run}/tensorboard/{run}-finetune")
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(("loss/train/total", "norm/"))]
    by_step = {name: sorted(events.Scalars(name), key=lambda event: event.step) for name in names}  # of several files
    return {name: [event.value for event in found] for name, found in by_step.items()}


@pytest.mark.long
def test_twenty_steps_leave_the_same_weights(tiny: Path) -> None:
    def train(runs: dict[str, tuple[str, ...]]) -> None:
        for run, options in runs.items():
            ssmvl.train(tiny, f"run={run}", *ONE_STAGE, *options)

    two_ranks(lambda: train(TWO_RANKS), tiny.parent)
    train(ONE_RANK)
    wanted, weights = logged("whole"), read_tensors(Path("runs/whole/model/model.safetensors"))[0]
    assert len(wanted["loss/train/total"]) == 20
    for run in [*ONE_RANK, *TWO_RANKS]:
        found = logged(run)
        assert found.keys() == wanted.keys()
        for name, values in found.items():
            assert values == pytest.approx(wanted[name], rel=1e-5 if "loss" in name else 1e-4), (run, name)
        tensors = read_tensors(Path(f"runs/{run}/model/model.safetensors"))[0]
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=1e-5, msg=f"{run}: {name}")
