"""Ablations: rows of the papers' tables as named recipes with overrides. Imports no torch.

They are listed in `recipes/ablations.yaml`. A name such as `ablation:ml_mamba/table7/csm` can be used wherever a
recipe's name can, except as the `base:` of another recipe.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ssmvl.errors import Problem, RecipeError, nearest
from ssmvl.recipes.binding import bind
from ssmvl.recipes.files import ABLATIONS_FILE, read_yaml, shipped_folders
from ssmvl.registry import Check

PREFIX = "ablation:"
Name = Annotated[str, Check("a name of letters, digits, ., _ and -", re.compile(r"\w[\w.-]*").fullmatch)]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Row of a paper's table. The fields are the schema of an entry.

    Args:
        table: table of the paper, e.g. `table7`.
        row: name of the row, e.g. `csm`.
        recipe: name of the recipe to which the overrides apply.
        overrides: `"a.b=c"`, applied one by one.
        published: the paper's results by benchmark.
        note: caveats about the published results.
    """

    table: Name
    row: Name
    recipe: Name
    overrides: list[str]
    published: dict[str, float]
    note: str = ""

    @property
    def name(self) -> str:
        """Name of the entry, e.g. `ml_mamba/table7/csm`."""
        return f"{self.recipe}/{self.table}/{self.row}"

    @property
    def run(self) -> str:
        """Name of the entry's run folder, e.g. `ml_mamba-table7-csm`."""
        return re.sub(r"[/.]", "-", self.name)


def read_ablations(path: Path) -> list[Ablation]:
    """Read the entries of a file, in their order.

    Raises:
        RecipeError: the file is not a list of entries, is empty, or has two entries of one name. Lists every problem.
    """
    nodes = read_yaml(path)
    if not isinstance(nodes, list):
        received = "a mapping" if isinstance(nodes, dict) else type(nodes).__name__
        raise RecipeError([Problem("", f"ablations must be a list of entries, received {received}")], str(path))
    if not nodes:
        raise RecipeError([Problem("", "the list has no entry; write at least one, or check a recipe")], str(path))
    entries: dict[str, Ablation] = {}
    problems = []
    for number, node in enumerate(nodes, 1):
        bound, errors = bind(node, Ablation, f"entry {number}", label="an ablation")
        problems += errors
        if not errors:
            entry: Ablation = bound()
            if entry.run in entries:
                other = entries[entry.run].name
                problems.append(Problem(f"entry {number}", f"{entry.name} would share its run folder with {other}"))
            entries.setdefault(entry.run, entry)
    if problems:
        raise RecipeError(problems, str(path))
    return list(entries.values())


@functools.cache
def shipped_ablations() -> list[Ablation]:
    """Return the entries that ship with the package."""
    paths = [folder / ABLATIONS_FILE for folder in shipped_folders() if (folder / ABLATIONS_FILE).is_file()]
    return read_ablations(paths[0]) if paths else []


def find_ablation(name: str) -> Ablation:
    """Find a shipped entry by name, with or without the prefix `ablation:`.

    Raises:
        RecipeError: the name is unknown. The message lists the nearest name and all names.
    """
    entries = {entry.name: entry for entry in shipped_ablations()}
    name = name.removeprefix(PREFIX)
    if name not in entries:
        raise RecipeError([Problem("", f"unknown ablation {name!r}.{nearest(name, entries)}")], PREFIX + name)
    return entries[name]
