"""Vision-language models based on state-space models, built from composable blocks and plugins.

Public names are imported on first use: `import ssmvl` imports neither torch nor any other heavy package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ssmvl import _moved as _moved

__version__ = "0.1.0"
"""The version of the installed package."""

__all__ = ["build_model", "load", "train", "check", "load_recipe", "list_components", "hookimpl", "__version__"]

if TYPE_CHECKING:
    from ssmvl.generation.assistant import load
    from ssmvl.model.build import build_model
    from ssmvl.plugins import hookimpl
    from ssmvl.recipes.merge import load_recipe
    from ssmvl.registry import Entry
    from ssmvl.training.checked import check
    from ssmvl.training.run import train

_HOME = {
    "build_model": "ssmvl.model.build",
    "load": "ssmvl.generation.assistant",
    "train": "ssmvl.training.run",
    "check": "ssmvl.training.checked",
    "load_recipe": "ssmvl.recipes.merge",
    "hookimpl": "ssmvl.plugins",
}


def list_components(kind: str | None = None) -> list[Entry]:
    """List all registered components, or those of one kind, sorted by kind and name."""
    from ssmvl.plugins import components

    return [entry for entry in components().entries() if kind in (None, entry.kind)]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ssmvl' has no attribute {name!r}")
