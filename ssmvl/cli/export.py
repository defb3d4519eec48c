"""`ssmvl export CHECKPOINT --out DIRECTORY [--recipe RECIPE] [--trust-pickle]`."""

from __future__ import annotations

import argparse

from ssmvl.cli.common import require_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: a checkpoint, an output directory and options."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run's checkpoint (a file or a directory of shards), or the directory of a stage's checkpoints, for the "
        "latest complete one; or the s3:// URL of either, which needs --recipe",
    )
    parser.add_argument("--out", required=True, metavar="DIRECTORY", help="directory for the saved model")
    parser.add_argument("--recipe", help="recipe or run folder (default: the run folder with the checkpoint)")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="read the shards' index, a pickle, even if it can execute code; only if you trust its author",
    )


def run(options: argparse.Namespace) -> int:
    """Save the model. Prints which checkpoint it is from, and newer ones that were skipped."""
    require_path(options.checkpoint, "file or directory")
    from ssmvl.training.checkpoints.export import export

    path, skipped = export(options.checkpoint, options.out, options.recipe, options.trust_pickle)
    for reason in skipped:
        print(f"skipping a checkpoint: {reason}")
    print(f"saved the model of {path} to {options.out}")
    return 0
