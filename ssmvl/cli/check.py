"""`ssmvl check RECIPE [a.b=c …]`."""

from __future__ import annotations

import argparse

from ssmvl.cli.common import recipe_arguments as arguments

__all__ = ["arguments", "run"]


def run(options: argparse.Namespace) -> int:
    """Print that the recipe is right, or every problem."""
    from ssmvl.recipe import load_recipe
    from ssmvl.training.stages import check

    recipe = load_recipe(options.recipe, *options.overrides)
    _, notes = check(recipe)
    print("\n".join([f"{recipe.source}: no problem found", *notes]))
    return 0
