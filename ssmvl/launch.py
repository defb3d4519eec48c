"""Runs a recipe as a script: `composer recipes/x.yaml` starts `python recipes/x.yaml`, which trains.

Python asks `sys.path_hooks` for an importer of the path that it is told to run. `ssmvl_recipes.pth`, installed next to
the package, imports this module if an argument of the interpreter ends in .yaml or .yml, or if the program is the
Composer launcher or was started by it. Every other start of Python pays only for these comparisons.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType
from typing import cast

_MAIN = "import sys; from ssmvl.training.run import main; sys.exit(main(sys.argv))"


class RecipeImporter:
    """Finder and loader of `__main__` for a recipe.

    Args:
        path: the path that Python was told to run.

    Raises:
        ImportError: it is not a recipe, so Python tries its own importers.
    """

    def __init__(self, path: str) -> None:
        is_file = path.endswith((".yaml", ".yml")) and Path(path).is_file()
        if not is_file and not _is_name(path):
            raise ImportError(f"{path!r} is not a recipe")
        self.path = path

    def find_spec(self, name: str, target: object = None) -> ModuleSpec | None:
        """Return a spec for `__main__` only."""
        return ModuleSpec(name, cast(Loader, self), origin=self.path) if name == "__main__" else None

    def get_code(self, name: str) -> CodeType:
        """Return the code of `__main__`: train the recipe."""
        return compile(_MAIN, self.path, "exec")


def _is_name(path: str) -> bool:
    """Return True if Composer's launcher was told to run a name instead of a file, as in `composer quickstart`."""
    script = next((text for text in sys.orig_argv[1:] if not text.startswith("-")), "")
    is_script = "LOCAL_WORLD_SIZE" in os.environ and Path(path) == Path(script).absolute() and not Path(path).exists()
    return is_script and re.fullmatch(r"[\w-]+|ablation:[\w/.-]+", script) is not None


def _quiet_launcher() -> None:
    """Have Composer's launcher not say that it waits for processes that have already finished successfully."""
    from composer.cli import launcher

    clean_up = launcher._cleanup_processes
    launcher._cleanup_processes = lambda processes: (
        None if all(process.poll() == 0 for process in processes.values()) else clean_up(processes)
    )


sys.path_hooks.insert(0, RecipeImporter)
if [Path(script).name for script in sys.orig_argv[1:2]] == ["composer"]:
    with suppress(ImportError, AttributeError):  # a later Composer may be different
        _quiet_launcher()
