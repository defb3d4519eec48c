"""A run: a recipe's stages one after another, each from files, then the evaluation.

`composer recipes/x.yaml`, `composer -m ssmvl.training.run recipes/x.yaml` and `ssmvl.train("x")` all end here.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ssmvl.errors import MissingDependencyError, SsmvlError
from ssmvl.recipe import Recipe, load_recipe
from ssmvl.training.stages import check


def train(recipe: str | Path | Recipe, *overrides: str) -> Path:
    """Train every stage of a recipe, evaluate, and return the run folder. Started again, it goes on where it was.

    Args:
        recipe: a name, a YAML file, or a recipe.
        overrides: `"stages.finetune.batch=128"`, applied one by one.

    Raises:
        RecipeError: every mistake of the recipe.
        RunError: the run folder belongs to another recipe.
        MissingDependencyError: Composer or streaming is not installed.
    """
    for module in ("composer", "streaming"):
        if find_spec(module) is None:
            raise MissingDependencyError(f"training needs {module}: pip install 'ssmvl[train]'")
    found = load_recipe(recipe, *overrides)
    plan, _ = check(found)
    from ssmvl.training.session import Session

    return Session(found, plan).run()


def main(argv: Sequence[str]) -> int:
    """`argv` is the recipe and its overrides; a mistake is printed without a traceback and gives exit code 2."""
    try:
        if not argv:
            raise SsmvlError("which recipe? composer recipes/quickstart.yaml")
        train(argv[0], *argv[1:])
    except SsmvlError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the launcher ends those that leave last: they leave with 2 too
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
