"""`ssmvl list [KIND [NAME]]`. Imports torch only to describe a single component."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from ssmvl.errors import DataError, RecipeError
from ssmvl.registry import INJECTED

SECTIONS = {  # parts of a recipe that are not components, and the class that is their schema
    "model": "ssmvl.model.blueprint:ModelParts",
    "stage": "ssmvl.training.schema:Stage",
    "optimizer": "ssmvl.training.optimizer:Optimizer",
    "loader": "ssmvl.data.mix:Loader",
    "evaluation": "ssmvl.evaluation.runner:Evaluation",
}
CONTRACTS = {
    "scan_order": "ScanOrder",
    "mixer": "Mixer",
    "encoder": "VisionEncoder",
    "fusion": "Fusion",
    "connector": "Connector",
    "language_model": "LanguageModel",
    "prompt": "Prompt",
    "dataset": "Data",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: an optional kind, singular or plural, and the name of one component."""
    kinds = [*sorted(INJECTED), *SECTIONS]
    parser.add_argument(
        "kind",
        nargs="?",
        choices=kinds,
        type=lambda kind: kind.removesuffix("s"),
        help="list one kind only; or show the options of a part of a recipe, such as stages",
    )
    parser.add_argument("name", nargs="?", help="show the options, contract and docstring of one component")


def run(options: argparse.Namespace) -> int:
    """Print all components, or a description of one."""
    if options.kind in SECTIONS:
        if options.name is not None:
            raise DataError(f"{options.kind} is a part of a recipe and has no names; remove {options.name!r}")
        module, _, name = SECTIONS[options.kind].partition(":")
        _describe(f"{options.kind} of a recipe", getattr(importlib.import_module(module), name))
        return 0
    return _list(options.kind) if options.name is None else _show(options.kind, options.name)


def _list(only: str | None) -> int:
    """Print kind, name and source of the components, then conflicts, and plugins that failed or are disabled."""
    from ssmvl.plugins import components
    from ssmvl.recipes.ablations import PREFIX, shipped_ablations
    from ssmvl.recipes.files import recipe_names

    registry = components()
    rows = [(entry.kind, entry.name, entry.source) for entry in registry.entries() if entry.kind != "recipe"]
    rows += [("recipe", name, "") for name in recipe_names()]
    rows += [("recipe", PREFIX + entry.name, "") for entry in shipped_ablations()]
    for kind, name, source in rows:
        if only in (None, kind):
            print(f"{kind:15} {name:20} {source}".rstrip())
    for entries in registry.conflicts():
        sources = " and ".join(entry.source for entry in entries)
        print(f"conflict: {entries[0].kind} {entries[0].name!r} is registered by both {sources}")
    for remark in registry.remarks():
        print(remark)
    return 0


def _show(kind: str, name: str) -> int:
    """Print the description of one component."""
    if kind == "recipe":
        raise DataError(f"ssmvl list does not describe recipes; run ssmvl show {name}")
    from ssmvl.plugins import components
    from ssmvl.recipes.binding import bind_part

    entry = components().find(kind, name)
    _, problems = bind_part(name, kind, "")
    broken = [problem for problem in problems if not problem.path]  # other problems are missing options
    if broken:
        raise RecipeError(broken, "ssmvl list")
    contract = f"ssmvl.interfaces.{CONTRACTS[kind]}" if kind in CONTRACTS else "ssmvl.checkpoints.Layout or None"
    _describe(f"{kind} {name!r} ({entry.source})", entry.load(), INJECTED[kind], contract)
    return 0


def _describe(title: str, factory: Any, injected: Iterable[str] = (), contract: str = "") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ssmvl.recipes.binding import options_of

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(title))
    if contract:
        console.print(Text(f"returns: {contract}; the library passes: {', '.join(injected) or 'nothing'}"))
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("option", "type", "default"):
        table.add_column(heading)
    for option in options_of(factory, injected):
        table.add_row(*map(Text, option))
    console.print(table if table.row_count else Text("This component has no options."))
    console.print(Text(inspect.getdoc(factory) or "This component has no docstring."))
