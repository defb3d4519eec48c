"""Run by two ranks: trains recipes; reports parameters that are not DTensors, and the images of each micro-batch.

composer -n 2 systems_script.py RECIPE … REPORT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from composer.utils import dist, get_device
from torch.distributed.tensor import DTensor

from ssmvl.recipes.merge import load_recipe
from ssmvl.training.checked import check
from ssmvl.training.session import Session

dist.initialize_dist(get_device(None))
reports = {}
for path in sys.argv[1:-1]:
    recipe = load_recipe(path, "stages.finetune.init_from=recipe")
    checked = check(recipe)
    trainer = Session(checked).trainer("finetune")
    model = trainer.state.model
    images: list[int] = []
    model.register_forward_pre_hook(lambda _, args, seen=images: seen.append(sum(args[0]["num_images"])))
    trainer.fit()
    plain = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    reports[checked.plan.run] = {"not_sharded": plain, "images": dist.all_gather_object(images)}
    trainer.close()
if dist.get_global_rank() == 0:
    Path(sys.argv[-1]).write_text(json.dumps(reports))
dist.barrier()
