"""`ssmvl list [KIND]`: imports no torch, so that it answers at once."""

from __future__ import annotations

import argparse

from ssmvl.registry import INJECTED


def arguments(parser: argparse.ArgumentParser) -> None:
    """An optional kind, in the singular or the plural."""
    kinds = sorted(INJECTED)
    parser.add_argument(
        "kind", nargs="?", choices=kinds, type=lambda kind: kind.removesuffix("s"), help="one kind only"
    )


def run(options: argparse.Namespace) -> int:
    """Print kind, name and source of every component, then conflicts and plugins that failed."""
    from ssmvl.plugins import components
    from ssmvl.recipes.ablations import PREFIX, shipped_ablations
    from ssmvl.recipes.files import recipe_names

    registry = components()
    rows = [(entry.kind, entry.name, entry.source) for entry in registry.entries() if entry.kind != "recipe"]
    rows += [("recipe", name, "") for name in recipe_names()]
    rows += [("recipe", PREFIX + entry.name, "") for entry in shipped_ablations()]
    for kind, name, source in rows:
        if options.kind in (None, kind):
            print(f"{kind:15} {name:20} {source}".rstrip())
    for entries in registry.conflicts():
        sources = " and ".join(entry.source for entry in entries)
        print(f"conflict: {entries[0].kind} {entries[0].name!r} is offered by both {sources}")
    for failure in registry.failures:
        print(failure)
    return 0
