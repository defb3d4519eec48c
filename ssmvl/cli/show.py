"""`ssmvl show RECIPE [a.b=c …]`, or `ssmvl show --scan csm [--grid 1x4x6] [--png FILE]`."""

from __future__ import annotations

import argparse
from pathlib import Path

MOST_CELLS = 10_000


def arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe and its overrides, or a scan order and a grid."""
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("recipe", nargs="?", help="a name (`ssmvl list`) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, applied one by one")
    one.add_argument("--scan", metavar="NAME", help="draw this scan order instead (`ssmvl list scan_order`)")
    parser.add_argument("--grid", type=_grid, metavar="MAPSxROWSxCOLUMNS", help="what it scans; 1x4x6 if left out")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw it into this PNG file")
    parser.set_defaults(refuse=parser.error)


def run(options: argparse.Namespace) -> int:
    """Print the merged recipe as YAML, or draw the scan order."""
    if options.scan is not None:
        return _draw(options.scan, options.grid or (1, 4, 6), options.png)
    if options.grid or options.png:
        options.refuse("--grid and --png belong to --scan")
    from ssmvl.recipe import load_recipe

    print(load_recipe(options.recipe, *options.overrides).to_yaml(), end="")
    return 0


def _draw(name: str, sides: tuple[int, ...], png: Path | None) -> int:
    from rich.console import Console

    from ssmvl.binding import bind_part
    from ssmvl.errors import RecipeError
    from ssmvl.interfaces import Grid
    from ssmvl.ops.reorder import path_table
    from ssmvl.pictures.scan_paths import terminal_drawing, write_png

    order, problems = bind_part(name, "scan_order", "--scan")
    if problems:
        raise RecipeError(problems, "ssmvl show")
    grid = Grid(*sides)
    paths = path_table(order, grid)
    if png:
        write_png(paths, grid, png)
    console = Console()
    console.print(terminal_drawing(paths, grid, console.width))
    return 0


def _grid(text: str) -> tuple[int, ...]:
    """`MAPSxROWSxCOLUMNS`, or `ROWSxCOLUMNS` of one map."""
    sides = [int(side) if side.isascii() and side.isdigit() else 0 for side in text.split("x")]
    maps, rows, columns = [1, *sides] if len(sides) == 2 else sides if len(sides) == 3 else (0, 0, 0)
    if not 0 < maps * rows * columns <= MOST_CELLS:
        allowed = f"MAPSxROWSxCOLUMNS or ROWSxCOLUMNS of whole numbers from 1, {MOST_CELLS:,} cells at most"
        raise argparse.ArgumentTypeError(f"received {text!r}, allowed is {allowed}, such as 1x4x6")
    return maps, rows, columns
