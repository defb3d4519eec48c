"""Two ranks on this machine; forked, because importing Composer takes longer than most of what they do."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
from composer.utils import checkpoint


def two_ranks(work: Callable[[], object], folder: Path) -> list[str]:
    """Call `work` on both and return the output of each, stdout and stderr; an exception in one ends both."""
    torch.multiprocessing.start_processes(_rank, (work, folder), nprocs=2, start_method="fork")
    return [(folder / f"rank{rank}.txt").read_text() for rank in (0, 1)]


def _rank(rank: int, work: Callable[[], object], folder: Path) -> None:
    torch.set_num_threads(1)  # the threads of the parent do not exist in a fork
    variables = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in variables.items()})
    checkpoint._TORCH_DISTRIBUTED_CHECKPOINTS_FILENAME = f"__{rank}_0.distcp"  # Composer set it before the fork
    store, limit = torch.distributed.FileStore(str(folder / "store"), 2), timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    with (folder / f"rank{rank}.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        work()
