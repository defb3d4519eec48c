"""`ssmvl data convert SOURCE… --out OUT`, `ssmvl data verify DIRECTORY`, `ssmvl data inspect DIRECTORY`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ssmvl.cli.common import integer, positive_integer, require_path
from ssmvl.errors import DataError

if TYPE_CHECKING:
    from ssmvl.data.inspection.inspect import Reader
    from ssmvl.processing.processor import Processor

CONVERT = """Convert published files to shards in OUT/train. The same command resumes an interrupted conversion."""
VERIFY = """Verify every byte of shards: sizes, hashes, records, images. Exit code 2 if there is a problem."""
INSPECT = """Show the contents of shards; with a recipe, also the lengths of the samples in its model's tokens."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    convert = actions.add_parser("convert", help="published files -> shards", description=CONVERT)
    convert.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="SOURCE",
        help="JSON or JSON Lines (LLaVA's or LRV-Instruct's), parquet, WebDataset tars, or a directory of the last two",
    )
    convert.add_argument("--out", required=True, help="a directory, or a URL such as s3://bucket/dir")
    convert.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="[PREFIX=]PATH",
        help="directory or zip of the images that a JSON names (default: the JSON's directory); repeatable",
    )
    convert.add_argument("--split", default="train", help="name of the subdirectory (default: train)")
    convert.add_argument(
        "--max-side", type=positive_integer, metavar="N", help="shrink larger images to a longer side of N pixels"
    )
    convert.add_argument(
        "--workers", type=positive_integer, metavar="N", help="number of processes (default: one per core)"
    )

    verify = actions.add_parser("verify", help="find every damaged shard and sample", description=VERIFY)
    verify.add_argument("folder", metavar="DIRECTORY", help="a directory or a URL")
    verify.add_argument(
        "--workers", type=positive_integer, metavar="N", help="number of processes (default: one per core)"
    )

    inspect = actions.add_parser("inspect", help="show counts, lengths and samples", description=INSPECT)
    inspect.add_argument("folder", metavar="DIRECTORY", help="a directory or a URL")
    inspect.add_argument("--recipe", help="measure and show the samples as this recipe's model reads them")
    inspect.add_argument(
        "--stage", metavar="NAME", help="stage of the recipe whose prompt is used (default: the first one)"
    )
    inspect.add_argument(
        "--samples", type=integer, default=2000, metavar="N", help="number of samples; 0 means all (default: 2000)"
    )
    inspect.add_argument("--png", type=Path, metavar="FILE", help="draw samples, with the supervised text in color")


def run(options: argparse.Namespace) -> int:
    """Run the action. Returns 2 if `verify` finds problems."""
    if options.action == "convert":
        for source in options.sources:
            require_path(str(source), "source")
        from ssmvl.data.conversion.convert import convert

        summary = convert(
            options.sources,
            options.out,
            images=options.images,
            split=options.split,
            max_side=options.max_side,
            workers=options.workers,
        )
        print(summary)
    elif options.action == "verify":
        require_path(options.folder, "directory")
        from ssmvl.data.inspection.verify import verify

        result = verify(options.folder, options.workers)
        print(result)
        return 2 if result.problems else 0
    else:
        reader = _reader(options)
        require_path(options.folder, "directory")
        from ssmvl.data.inspection.inspect import inspect

        inspect(options.folder, reader, options.samples, options.png)
    return 0


def _reader(options: argparse.Namespace) -> Reader | None:
    """Return a function that loads the stage's processor and its label; None without a recipe."""
    if options.recipe is None:
        if options.png or options.stage:
            raise DataError("--png and --stage need a recipe; add --recipe NAME")
        return None
    from ssmvl.recipes.merge import load_recipe

    recipe = load_recipe(options.recipe)

    def read() -> tuple[Processor, str]:
        from ssmvl.training.checked import stage_processor

        return stage_processor(recipe, options.stage)

    return read
