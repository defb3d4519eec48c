"""Arguments that several verbs take."""

from __future__ import annotations

import argparse


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe and its overrides."""
    parser.add_argument("recipe", help="a name (`ssmvl list`) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, applied one by one")
