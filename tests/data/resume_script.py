"""Print the batches of four epochs and the states after each batch; or resume from given states and print the rest.

python resume_script.py ROOT '{"weights": …, "workers": …}' ['[{"epoch": …}, …]']
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ssmvl.data.mix import Loader
from ssmvl.data.streams import TrainLoader, train_loader
from ssmvl.interfaces import ImageSpec, Stream
from ssmvl.processing.processor import Processor
from ssmvl.processing.prompts import MambaPrompt
from ssmvl.processing.tokenizers import byte_tokenizer

BATCH = 4
root, spec = Path(sys.argv[1]), json.loads(sys.argv[2])
streams = [Stream(root / name, **weight) for name, weight in spec["weights"].items()]
processor = Processor(byte_tokenizer(), MambaPrompt(), (ImageSpec(8),), tokens_per_image=2)


def new_loader() -> TrainLoader:
    return train_loader(streams, processor, batch=BATCH, seed=3, loader=Loader(workers=spec["workers"]))


states, rest = {}, []
if len(sys.argv) > 3:
    for state in json.loads(sys.argv[3]):
        loader = new_loader()
        loader.load_state_dict(state)
        rest.append([[batch["sample_ids"] for batch in loader] for _ in range(2)])
else:
    loader = new_loader()
    for epoch in range(4):
        rest.append([])
        seen = 0
        for number, batch in enumerate(loader, start=1):
            rest[-1].append(batch["sample_ids"])
            seen += len(batch["sample_ids"])
            states[f"{epoch} {number}"] = [
                loader.state_dict(),
                loader.dataset.state_dict(seen, True),  # as Composer calls it
            ]
        states[f"{epoch + 1} 0"] = [None, loader.dataset.state_dict(0, True)]
print(json.dumps([rest, states]))
