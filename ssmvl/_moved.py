"""Deprecated import paths, which still work with a DeprecationWarning. See CONTRIBUTING.md."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REMOVED_IN = "0.4"
MODULES = {  # with their submodules
    "ssmvl.assistant": "ssmvl.generation.assistant",
    "ssmvl.build": "ssmvl.model.build",
    "ssmvl.recipe": "ssmvl.recipes.merge",
    "ssmvl.text": "ssmvl.processing",
    "ssmvl.vision.open_clip_encoders": "ssmvl_open_clip.encoders",
    "ssmvl.vision.sources": "ssmvl.vision.pretrained",
    "ssmvl.vision.transforms": "ssmvl.processing.transforms",
    "ssmvl.vlm": "ssmvl.model.vlm",
}
NAMES = {  # renamed, or moved out of a module that still exists
    "ssmvl.checkpoints.Foreign": "ssmvl.checkpoints.OpenedCheckpoint",
    "ssmvl.checkpoints.flush": "ssmvl.files.flush",
    "ssmvl.checkpoints.written_whole": "ssmvl.files.written_whole",
    "ssmvl.processing.prompts.learned": "ssmvl.processing.prompts.supervised_pieces",
    "ssmvl.vision.pretrained.weights_place": "ssmvl.vision.pretrained.weights_path",
    "ssmvl.vision.pretrained.settled_tag": "ssmvl.vision.pretrained.resolve_tag",
}


class MovedModules(MetaPathFinder, Loader):
    """Import hook for moved modules under their old names."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return a spec for the old name of a moved module, None for any other name."""
        if new := _moved(name):
            _warn(name, new)
            return ModuleSpec(name, self)
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Register the moved module under its old name too, so that both names give the same classes."""
        sys.modules[module.__name__] = importlib.import_module(_moved(module.__name__))


def moved_name(module: str, name: str) -> Any:
    """Return an attribute that a module had under an earlier name or location.

    Raises:
        AttributeError: the module never had an attribute of that name.
    """
    new = NAMES.get(f"{module}.{name}")
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", new)
    home, _, attribute = new.rpartition(".")
    return getattr(importlib.import_module(home), attribute)


def _moved(name: str) -> str:
    """Return the new name of a module, or an empty string if it has not moved."""
    old = next((old for old in MODULES if f"{name}.".startswith(f"{old}.")), None)
    return "" if old is None else MODULES[old] + name.removeprefix(old)


def _warn(old: str, new: str) -> None:
    text = f"{old} has moved to {new}; the old path will be removed in ssmvl {REMOVED_IN}"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


# First in line; otherwise `ssmvl.text.prompts` would load processing/prompts.py a second time.
sys.meta_path.insert(0, MovedModules())
