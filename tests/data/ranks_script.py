"""Start several local ranks, each of which writes the ids of its samples, epoch by epoch.

python ranks_script.py DIR OUT '{"world": …, "batch": …, "workers": …}'
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch

from ssmvl.data.mix import Loader
from ssmvl.data.streams import train_loader
from ssmvl.interfaces import ImageSpec
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt
from ssmvl.processing.tokenizers import byte_tokenizer

folder, out, spec = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
world = spec["world"]


def run(rank: int) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({key: str(value) for key, value in variables.items()})
    store = torch.distributed.FileStore(str(out / "store"), world)
    limit = timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    processor = Processor(byte_tokenizer(), MambaPrompt(), (ImageSpec(8),), tokens_per_image=2)
    loader = train_loader(folder, processor, batch=spec["batch"], seed=5, loader=Loader(workers=spec["workers"]))
    epochs = []
    for _ in range(2):
        batches = list(loader)
        ids = [batch["sample_ids"] for batch in batches]
        epochs.append([ids, [damaged[0] for batch in batches for damaged in batch["damaged"] if damaged]])
    (out / f"rank{rank}.json").write_text(json.dumps(epochs))
    torch.distributed.barrier()


# forked, so that slow imports run only once
ranks = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(world)]
for process in ranks:
    process.start()
for process in ranks:
    process.join()
sys.exit(any(process.exitcode for process in ranks))
