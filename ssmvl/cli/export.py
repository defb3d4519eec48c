"""`ssmvl export CHECKPOINT --out FOLDER [--recipe RECIPE] [--trust-pickle]`."""

from __future__ import annotations

import argparse

from ssmvl.cli.common import require_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """A checkpoint, and a folder for the model in it."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a file or folder of shards that a run wrote, or a stage's checkpoints, for the newest that is whole; "
        "or the s3:// URL of either, which needs --recipe",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the model is saved")
    parser.add_argument("--recipe", help="the recipe, or the folder, of its run (default: the run folder it lies in)")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="read the index of shards, which is a pickle, even if it could run any code: you know who wrote it",
    )


def run(options: argparse.Namespace) -> int:
    """Save the model; say which checkpoint it is of, and which newer ones are damaged."""
    require_path(options.checkpoint, "file or folder")
    from ssmvl.training.checkpoints.export import export

    path, passed = export(options.checkpoint, options.out, options.recipe, options.trust_pickle)
    for text in passed:
        print(f"passed over a checkpoint: {text}")
    print(f"{options.out} holds the model of {path}")
    return 0
