"""`ssmvl data convert SOURCE… --out OUT`, `ssmvl data verify FOLDER`, `ssmvl data inspect FOLDER [--recipe RECIPE]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ssmvl.cli.common import require_path
from ssmvl.errors import DataError

if TYPE_CHECKING:
    from ssmvl.data.inspection.inspect import Reader
    from ssmvl.processing.processor import Processor

CONVERT = """Write published files as shards to OUT/train. A run that was killed is continued by the same command."""
VERIFY = """Look at every byte of shards: sizes, hashes, records, images. Exit code 2 if there is a problem."""
INSPECT = """Show what shards hold; with a recipe, also how long the samples are to its model."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, and its options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    convert = actions.add_parser("convert", help="published files -> shards", description=CONVERT)
    convert.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="SOURCE",
        help="JSON or JSON lines (LLaVA's or LRV-Instruct's), parquet, WebDataset tars, or a folder of the last two",
    )
    convert.add_argument("--out", required=True, help="a folder, or a URL such as s3://bucket/folder")
    convert.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="[PREFIX=]PATH",
        help="folder or zip of the images that a JSON names (default: the JSON's folder); may be given several times",
    )
    convert.add_argument("--split", default="train", help="name of the subfolder (default: train)")
    convert.add_argument("--max-side", type=_positive, metavar="N", help="re-encode images whose longer side is more")
    convert.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one for each core)")

    verify = actions.add_parser("verify", help="find every damaged shard and sample", description=VERIFY)
    verify.add_argument("folder", metavar="FOLDER", help="a folder or a URL")
    verify.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one for each core)")

    inspect = actions.add_parser("inspect", help="show counts, lengths and samples", description=INSPECT)
    inspect.add_argument("folder", metavar="FOLDER", help="a folder or a URL")
    inspect.add_argument("--recipe", help="measure and show the samples as this recipe's model reads them")
    inspect.add_argument("--stage", metavar="NAME", help="whose prompt is used (default: the first one)")
    inspect.add_argument("--samples", type=_count, default=2000, metavar="N", help="look at N, 0: all (default: 2000)")
    inspect.add_argument("--png", type=Path, metavar="FILE", help="draw samples with the text that is learned coloured")


def run(options: argparse.Namespace) -> int:
    """Do it; 2 if `verify` finds problems."""
    if options.action == "convert":
        for source in options.sources:
            require_path(str(source), "source")
        from ssmvl.data.conversion.convert import convert

        found = convert(
            options.sources,
            options.out,
            images=options.images,
            split=options.split,
            max_side=options.max_side,
            workers=options.workers,
        )
        print(found)
    elif options.action == "verify":
        require_path(options.folder, "folder")
        from ssmvl.data.inspection.verify import verify

        checked = verify(options.folder, options.workers)
        print(checked)
        return 2 if checked.problems else 0
    else:
        reader = _reader(options)
        require_path(options.folder, "folder")
        from ssmvl.data.inspection.inspect import inspect

        inspect(options.folder, reader, options.samples, options.png)
    return 0


def _reader(options: argparse.Namespace) -> Reader | None:
    """A function that returns the processor of the recipe's stage and its label; None without a recipe."""
    if options.recipe is None:
        if options.png or options.stage:
            raise DataError("what a model reads depends on its recipe; give one: --recipe NAME")
        return None
    from ssmvl.recipes.merge import load_recipe

    recipe = load_recipe(options.recipe)

    def read() -> tuple[Processor, str]:
        from ssmvl.training.checked import stage_processor

        return stage_processor(recipe, options.stage)

    return read


def _positive(text: str) -> int:
    return _count(text, 1)


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return int(text)
