"""`ssmvl train RECIPE [a.b=c …]`."""

from __future__ import annotations

import argparse

from ssmvl.cli.common import merged_recipe, recipe_arguments, require_packages

arguments = recipe_arguments


def run(options: argparse.Namespace) -> int:
    """Train on this machine, one rank."""
    recipe = merged_recipe(options)
    require_packages("train", "composer", "streaming")
    stages = recipe.data.get("stages")
    stage = recipe.data.get("stage")
    # After the last stage test questions are asked, which takes a model.
    if isinstance(stages, dict) and isinstance(stage, str) and stage in list(stages)[:-1]:
        from ssmvl.training.run_folder import finished_stage

        if told := finished_stage(recipe, stage):
            print(told)
            return 0
    from ssmvl.training.run import train

    train(recipe)
    return 0
