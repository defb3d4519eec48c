"""Started as one of several ranks: writes the names of this rank's samples, epoch by epoch.

python ranks_script.py FOLDER OUT '{"batch": …, "workers": …}'
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch

from ssmvl.data.mix import Loader
from ssmvl.data.streams import train_loader
from ssmvl.interfaces import ImageSpec
from ssmvl.text.processor import Processor
from ssmvl.text.prompts import MambaPrompt
from ssmvl.text.tokenizers import byte_tokenizer

folder, out, spec = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
store = torch.distributed.FileStore(str(out / "store"), world)
limit = timedelta(seconds=60)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
processor = Processor(byte_tokenizer(), MambaPrompt(), (ImageSpec(8),), places=2)
loader = train_loader(folder, processor, batch=spec["batch"], seed=5, loader=Loader(workers=spec["workers"]))
epochs = []
for _ in range(2):
    batches = list(loader)
    names = [batch["sample_ids"] for batch in batches]
    epochs.append([names, [damaged[0] for batch in batches for damaged in batch["damaged"] if damaged]])
(out / f"rank{rank}.json").write_text(json.dumps(epochs))
torch.distributed.barrier()
