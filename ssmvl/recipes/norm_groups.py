"""Make the default of `norm_groups` explicit, which was different in ssmvl 0.1. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SAVED_BESIDE = ("ssmvl.json", ".lock", "*/checkpoints", "model/ssmvl.json")  # files of saved models and run folders


def is_saved(path: Path) -> bool:
    """Return True if the library wrote this recipe file, with a saved model or in a run folder."""
    return path.name == "recipe.yaml" and any(any(path.parent.glob(name)) for name in SAVED_BESIDE)


def write_out(node: Any, saved: bool = False) -> Any:
    """Add `norm_groups` to each `mamba2` mixer with several groups that does not state it.

    Args:
        node: a recipe's data, or a part of it.
        saved: whether the library wrote it. The default of recipes saved by ssmvl 0.1 is to normalize the whole width;
            today's default is to normalize each group.
    """
    if isinstance(node, list):
        return [write_out(item, saved) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: write_out(value, saved) for key, value in node.items()}
    groups = str(node.get("num_groups", 1)).replace("_", "")
    if node.get("name") == "mamba2" and groups.isdecimal() and int(groups) > 1 and node.get("norm_groups") is None:
        node["norm_groups"] = 1 if saved else int(groups)
    return node
