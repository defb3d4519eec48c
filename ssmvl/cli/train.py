"""`ssmvl train RECIPE [a.b=c …]`."""

from __future__ import annotations

import argparse

from ssmvl.cli.common import merged_recipe, recipe_arguments, require_packages

arguments = recipe_arguments


def run(options: argparse.Namespace) -> int:
    """Train on this machine with one rank."""
    recipe = merged_recipe(options)
    require_packages("train", "composer", "streaming")
    stages = recipe.data.get("stages")
    stage = recipe.data.get("stage")
    # Even if the last stage is finished, the evaluation follows it and needs torch.
    if isinstance(stages, dict) and isinstance(stage, str) and stage in list(stages)[:-1]:
        from ssmvl.training.run_folder import finished_stage

        if message := finished_stage(recipe, stage):
            print(message)
            return 0
    from ssmvl.training.run import train

    train(recipe)
    return 0
