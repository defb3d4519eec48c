"""Two ranks on this machine, forked, because Composer's import takes longer than most of what they do."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
from composer.utils import checkpoint


def two_ranks(work: Callable[[], object], folder: Path) -> list[str]:
    """What each says on its standard output and error while it does `work`; an exception of one ends both."""
    torch.multiprocessing.start_processes(_rank, (work, folder), nprocs=2, start_method="fork")
    return [(folder / f"rank{rank}.txt").read_text() for rank in (0, 1)]


def _rank(rank: int, work: Callable[[], object], folder: Path) -> None:
    torch.set_num_threads(1)  # those of the first process are not in this one
    place = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in place.items()})
    checkpoint._TORCH_DISTRIBUTED_CHECKPOINTS_FILENAME = f"__{rank}_0.distcp"  # as it was when Composer was imported
    store, limit = torch.distributed.FileStore(str(folder / "store"), 2), timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    with (folder / f"rank{rank}.txt").open("w") as said, redirect_stdout(said), redirect_stderr(said):
        work()
