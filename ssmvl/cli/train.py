"""`ssmvl train RECIPE [a.b=c …]`."""

from __future__ import annotations

import argparse

from ssmvl.cli.common import recipe_arguments

arguments = recipe_arguments


def run(options: argparse.Namespace) -> int:
    """Train on this machine, one rank."""
    from ssmvl.training.run import train

    train(options.recipe, *options.overrides)
    return 0
