"""`ssmvl check RECIPE [a.b=c …]`; RECIPE may also be a file of ablations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ssmvl.cli.common import merged_recipe, recipe_arguments
from ssmvl.errors import Problem, RecipeError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: a recipe, its overrides, and a flag to open its data."""
    recipe_arguments(parser)
    parser.add_argument("--data", action="store_true", help="also open the data, and look up ids on the Hub")


def run(options: argparse.Namespace) -> int:
    """Print that the recipe has no problem. Otherwise raise an error with all of them."""
    from ssmvl.recipes.files import read_yaml

    path = Path(options.recipe)
    if path.suffix in (".yaml", ".yml") and path.is_file() and isinstance(read_yaml(path), list):
        return _check_ablations(path, options.overrides, options.data)
    recipe = merged_recipe(options)
    from ssmvl.training.checked import check

    checked = check(recipe, data=options.data)
    print("\n".join([f"{recipe.source}: no problem found", *checked.notes]))
    return 0


def _check_ablations(path: Path, overrides: Sequence[str], data: bool) -> int:
    """Print one line per entry, then raise one error with the problems of all entries."""
    from ssmvl.recipes.ablations import PREFIX, read_ablations
    from ssmvl.recipes.merge import load_recipe
    from ssmvl.training.checked import check

    problems: list[Problem] = []
    notes: dict[str, None] = {}
    for entry in read_ablations(path):
        entry_problems: Sequence[Problem] = ()
        try:
            notes |= dict.fromkeys(check(load_recipe(entry, *overrides), data=data).notes)
        except RecipeError as error:
            entry_problems = error.problems
        count = len(entry_problems)
        result = f"{count} problem{'s' * (count != 1)}" if count else "no problem found"
        print(f"{PREFIX}{entry.name}: {result}", flush=True)
        problems += [Problem(entry.name, str(problem)) for problem in entry_problems]
    if problems:
        raise RecipeError(problems, str(path))
    print("".join(f"{note}\n" for note in notes), end="")
    return 0
