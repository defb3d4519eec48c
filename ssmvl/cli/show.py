"""`ssmvl show RECIPE [a.b=c …]`."""

from __future__ import annotations

import argparse

from ssmvl.cli.common import recipe_arguments as arguments

__all__ = ["arguments", "run"]


def run(options: argparse.Namespace) -> int:
    """Print the merged recipe as YAML."""
    from ssmvl.recipe import load_recipe

    print(load_recipe(options.recipe, *options.overrides).to_yaml(), end="")
    return 0
