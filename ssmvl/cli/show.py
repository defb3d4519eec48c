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

MAX_CELLS = 10_000


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: a recipe and its overrides, or a scan order and a grid."""
    exclusive = parser.add_mutually_exclusive_group(required=True)
    exclusive.add_argument("recipe", nargs="?", help="name of a recipe (see `ssmvl list`), or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, applied one by one")
    # It takes overrides too, because argparse assigns words after a flag to no other argument.
    parser.add_argument(
        "--params", nargs="*", metavar="a.b=c", help="show the parts of the model: shapes, parameters, FLOPs"
    )
    exclusive.add_argument("--scan", metavar="NAME", help="draw this scan order instead (`ssmvl list scan_order`)")
    parser.add_argument("--grid", type=_grid, metavar="MAPSxROWSxCOLUMNS", help="the grid to scan (default: 1x4x6)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the paths to this PNG file")
    parser.set_defaults(usage_error=parser.error)


def run(options: argparse.Namespace) -> int:
    """Print a merged recipe as YAML (for an ablation, with published results) or its costs, or draw a scan order."""
    if options.scan is not None:
        if options.params is not None:
            options.usage_error("--params needs a recipe")
        return _draw(options.scan, options.grid or (1, 4, 6), options.png)
    if options.grid or options.png:
        options.usage_error("--grid and --png need --scan")
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
    """Return an ablation's table, row and published results, as YAML comments."""
    results = ", ".join(f"{benchmark} {value:g}" for benchmark, value in entry.published.items())
    lines = [f"{entry.recipe}, {entry.table}, row {entry.row}", f"published: {results}"]
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
    console.print(_costs(costs), "")
    for cost in costs:
        if cost.tied:
            console.print(
                f"{cost.name} shares {cost.tied:,} parameters with a part above (tied); they are counted once."
            )
        if cost.unused:
            console.print(f"{cost.name} has {cost.unused:,} parameters that this forward does not use.")
    console.print(
        "FLOPs: a multiply-add counts as 2. Matrix products, convolutions and attention are counted, as the torch"
        " backend runs them on a GPU. Element-wise work is not counted: norms, gates, the causal convolution, the"
        " update of a Mamba-1 state."
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


def _costs(costs: list[PartCost]) -> Table:
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
        components().find("scan_order", name)  # reports an unknown name before torch is imported
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
    """Parse `MAPSxROWSxCOLUMNS`, or `ROWSxCOLUMNS` for one map."""
    sides = [int(side) if side.isascii() and side.isdigit() else 0 for side in text.split("x")]
    maps, rows, columns = [1, *sides] if len(sides) == 2 else sides if len(sides) == 3 else (0, 0, 0)
    if not 0 < maps * rows * columns <= MAX_CELLS:
        allowed = f"MAPSxROWSxCOLUMNS or ROWSxCOLUMNS of positive integers, such as 1x4x6, at most {MAX_CELLS:,} cells"
        raise argparse.ArgumentTypeError(f"must be {allowed}, received {text!r}")
    return maps, rows, columns
