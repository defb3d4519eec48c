"""Lets Python run a recipe as a script: `composer recipes/x.yaml` starts `python recipes/x.yaml`.

Python asks `sys.path_hooks` whether something can run the path it was given. The file `ssmvl_recipes.pth`, installed
beside the package, imports this module only when an argument of the interpreter ends in .yaml or .yml; every other
start of Python pays that one comparison.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType
from typing import cast

_MAIN = "import sys; from ssmvl.training.run import main; sys.exit(main(sys.argv))"


class RecipeImporter:
    """Finder and loader of `__main__` for a path that is a YAML file.

    Args:
        path: what Python was asked to run.

    Raises:
        ImportError: it is no YAML file, so Python goes on to its own importers.
    """

    def __init__(self, path: str) -> None:
        if not (path.endswith((".yaml", ".yml")) and Path(path).is_file()):
            raise ImportError(f"{path!r} is no recipe")
        self.path = path

    def find_spec(self, name: str, target: object = None) -> ModuleSpec | None:
        """A spec for `__main__`, nothing else."""
        return ModuleSpec(name, cast(Loader, self), origin=self.path) if name == "__main__" else None

    def get_code(self, name: str) -> CodeType:
        """What `__main__` runs: the recipe's training."""
        return compile(_MAIN, self.path, "exec")


sys.path_hooks.insert(0, RecipeImporter)
