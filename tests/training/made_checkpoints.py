"""Checkpoints as a run leaves them, made without training: one file, or shards with their index."""

from __future__ import annotations

import datetime
import pickle
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import Metadata

import ssmvl
from ssmvl.recipes.merge import Recipe, load_recipe

CHECKPOINTS = Path("runs/quickstart/align/checkpoints")
FILE, SHARDS = CHECKPOINTS / "ep0-ba4-rank0.pt", CHECKPOINTS / "ep0-ba4"


def state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a trainer saves, in small: plain data, and some that is not."""
    optimizer = {f"model.{name}": {"exp_avg": torch.zeros_like(tensor)} for name, tensor in tensors.items()}
    clock = {"batch": 4, "total_wct": datetime.timedelta(seconds=2)}
    return {
        "state": {
            "model": {f"model.{name}": tensor for name, tensor in tensors.items()},
            "optimizers": {"AdamW": {"state": optimizer}},
            "callbacks": {"Counts": defaultdict(int, {"seen": 3})},
            "timestamp": clock,
        },
        "rng": [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}],
    }


def run_of(recipe: str, *overrides: str) -> tuple[Recipe, dict[str, Tensor]]:
    """A run folder `runs/<run>` with nothing but its recipe; its recipe, and tensors that its model could have."""
    found = load_recipe(recipe, *overrides)
    folder = Path("runs", found.data["run"])
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(found.to_yaml())
    return found, ssmvl.build_model(found).state_dict()


def write_file(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def write_shards(path: Path, content: dict[str, Any], change: Callable[[Metadata], object] | None = None) -> Path:
    """A folder of shards; `change` is made in its index."""
    checkpoint.save(content, checkpoint_id=path, no_dist=True)
    if change is not None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        change(metadata)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


WRITERS: dict[str, Callable[[Any], Path]] = {
    "file": lambda content: write_file(FILE, content),
    "shards": lambda content: write_shards(SHARDS, content),
}


def weights(folder: Path) -> dict[str, Tensor]:
    return ssmvl.load(folder).model.state_dict()


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
