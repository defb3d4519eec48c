"""Run by two ranks: shards a model as a run does, and reports the parameters that are not DTensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from composer.utils import dist, get_device
from PIL import Image
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from ssmvl.model.build import build_model
from ssmvl.processing.batch import collate
from ssmvl.recipes.merge import load_recipe
from ssmvl.training.checked import check
from ssmvl.training.session import Session

recipe = load_recipe(sys.argv[1], "stages.finetune.init_from=recipe")
checked = check(recipe)
plan = checked.plan
dist.initialize_dist(get_device(None))
session = Session(checked)
trainer = session.trainer("finetune")
model = trainer.state.model.model
plain = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_global_rank() == 0:
    torch.manual_seed(plan.seed)
    single = build_model(recipe, weights="recipe").state_dict()
    equal = full.keys() == single.keys() and all(torch.equal(full[name], single[name]) for name in single)
    count = len(list(model.parameters()))
    report = {"sharded": count - len(plain), "not_sharded": plain, "equal_to_one_rank": equal}
# One rank has an image, the other text only: neither may wait for the other.
processor = trainer.state.train_dataloader.dataset.processor
images = [Image.new("RGB", (48, 48), "white")] if dist.get_global_rank() == 0 else []
conversation = [{"role": "user", "content": "Which row?"}, {"role": "assistant", "content": "2"}]
batch = collate([processor.encode(conversation, images)])
trainer.state.model.loss(trainer.state.model(batch), batch).backward()
norm = sum(p.grad.full_tensor().norm() for p in model.connector.parameters() if p.grad is not None)
if dist.get_global_rank() == 0:
    report = {**report, "gradient_of_the_rank_with_images": float(norm)}
    Path(sys.argv[2]).write_text(json.dumps(report))
dist.barrier()
trainer.close()
