"""`ssmvl show RECIPE [--params] [a.b=c …]`, or `ssmvl show --scan csm [--grid 1x4x6] [--png FILE]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ssmvl.cli.common import merged_recipe
from ssmvl.errors import Problem, RecipeError, SsmvlError

if TYPE_CHECKING:
    from rich.table import Table

    from ssmvl.model.costs import PartCost
    from ssmvl.model.vlm import VisionLanguageModel
    from ssmvl.recipes.ablations import Ablation
    from ssmvl.recipes.merge import Recipe

MOST_CELLS = 10_000


def arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe and its overrides, or a scan order and a grid."""
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("recipe", nargs="?", help="a name (`ssmvl list`) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, applied one by one")
    # It takes overrides too: argparse gives what follows a flag to no other argument.
    parser.add_argument("--params", nargs="*", metavar="a.b=c", help="show the recipe's parts and what they cost")
    one.add_argument("--scan", metavar="NAME", help="draw this scan order instead (`ssmvl list scan_order`)")
    parser.add_argument("--grid", type=_grid, metavar="MAPSxROWSxCOLUMNS", help="what it scans; 1x4x6 if left out")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw it into this PNG file")
    parser.set_defaults(refuse=parser.error)


def run(options: argparse.Namespace) -> int:
    """Print the merged recipe as YAML (of an ablation, also what was published) or its costs, or draw a scan order."""
    if options.scan is not None:
        if options.params is not None:
            options.refuse("--params belongs to a recipe")
        return _draw(options.scan, options.grid or (1, 4, 6), options.png)
    if options.grid or options.png:
        options.refuse("--grid and --png belong to --scan")
    from ssmvl.recipes.ablations import PREFIX, find_ablation

    options.overrides += options.params or []
    if options.params is not None:
        return _print_costs(merged_recipe(options))
    from ssmvl.recipes.merge import load_recipe

    recipe = load_recipe(options.recipe, *options.overrides)
    if options.recipe.startswith(PREFIX):
        print(_about(find_ablation(options.recipe)))
    print(recipe.to_yaml(), end="")
    return 0


def _about(entry: Ablation) -> str:
    """Which row of which table it is, and what was published there, as comments of YAML."""
    figures = ", ".join(f"{benchmark} {figure:g}" for benchmark, figure in entry.published.items())
    lines = [f"{entry.recipe}, {entry.table}, row {entry.row}", f"published: {figures}"]
    lines += [f"note: {' '.join(entry.note.split())}"] if entry.note else []
    return "\n".join(f"# {line}" for line in lines)


def _print_costs(recipe: Recipe) -> int:
    from rich.console import Console

    from ssmvl.model.blueprint import Blueprint
    from ssmvl.model.costs import TEXT_POSITIONS, describe

    model = Blueprint.of(recipe).model
    costs = describe(model)
    console = Console(highlight=False)
    console.print(f"One image and {TEXT_POSITIONS} supervised text positions.\n")
    console.print(_shapes(model, costs), "")
    console.print(_figures(costs), "")
    for cost in costs:
        if cost.tied:
            console.print(f"{cost.name} shares {cost.tied:,} parameters with a part above (tied): counted once.")
        if cost.unused:
            console.print(f"{cost.name} has {cost.unused:,} parameters that this forward does not use.")
    console.print(
        "FLOPs: a multiply-add is 2. Matrix products, convolutions and attention are counted, as the torch backend runs"
        " them on a GPU; element-wise work is not: norms, gates, the causal convolution, the update of a Mamba-1 state."
    )
    return 0


def _shapes(model: VisionLanguageModel, costs: list[PartCost]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "axes", "shape"):
        table.add_column(heading)
    for spec in model.image_specs:
        table.add_row("image", "(I, 3, S, S)", f"1 × 3 × {spec.size} × {spec.size}")
    for cost in costs:
        table.add_row(cost.name, cost.letters, " × ".join(map(str, cost.shape)))
    return table


def _figures(costs: list[PartCost]) -> Table:
    from rich.filesize import decimal, pick_unit_and_suffix
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("parameters", "share", "bf16", "fp32", "FLOPs"):
        table.add_column(heading, justify="right")
    total = sum(cost.parameters for cost in costs)
    rows = [(cost.name, cost.parameters, cost.flops) for cost in costs]
    for name, parameters, flops in [*rows, ("total", total, sum(cost.flops for cost in costs))]:
        unit, suffix = pick_unit_and_suffix(flops, ["", "k", "M", "G", "T", "P"], 1000)
        work = f"{flops / unit:.2f} {suffix}" if suffix else str(flops)
        sizes = (decimal(parameters * width, precision=2) for width in (2, 4))
        table.add_row(name, f"{parameters:,}", f"{parameters / total:.1%}", *sizes, work)
    return table


def _draw(name: str, sides: tuple[int, ...], png: Path | None) -> int:
    from rich.console import Console

    from ssmvl.plugins import components

    try:
        components().find("scan_order", name)  # before torch is imported
    except SsmvlError as error:
        raise RecipeError([Problem("--scan", str(error))], "ssmvl show") from error
    from ssmvl.drawing.scan_paths import terminal_drawing, write_png
    from ssmvl.interfaces import Grid
    from ssmvl.ops.reorder import path_table
    from ssmvl.recipes.binding import bind_part

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
