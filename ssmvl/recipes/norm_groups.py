"""The default of `norm_groups`, written out: ssmvl 0.1 had another one. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SAVED_BESIDE = ("ssmvl.json", ".lock", "*/checkpoints", "model/ssmvl.json")  # of a saved model, and of a run folder


def is_saved(path: Path) -> bool:
    """True if the library wrote a recipe file, with a model or in a run folder."""
    return path.name == "recipe.yaml" and any(any(path.parent.glob(name)) for name in SAVED_BESIDE)


def write_out(node: Any, saved: bool = False) -> Any:
    """A recipe's data in which each `mamba2` mixer of several groups states its `norm_groups`.

    Args:
        node: a recipe's data, or a part of it.
        saved: whether the library wrote it. Without `norm_groups`, what ssmvl 0.1 saved normalizes the whole width, and
            a recipe of today each group.
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
