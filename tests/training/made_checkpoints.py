"""Checkpoints like those of a run, made without training: one file, or shards with their index."""

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
    """A small version of what a trainer saves: plain data, and some objects that are not."""
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
    """Make a run folder `runs/<run>` that holds only its recipe; return the recipe, and tensors for its model."""
    loaded = load_recipe(recipe, *overrides)
    folder = Path("runs", loaded.data["run"])
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(loaded.to_yaml())
    return loaded, ssmvl.build_model(loaded).state_dict()


def write_file(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def write_shards(path: Path, content: dict[str, Any], change: Callable[[Metadata], object] | None = None) -> Path:
    """Write a directory of shards; `change` edits its index."""
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


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in second)
