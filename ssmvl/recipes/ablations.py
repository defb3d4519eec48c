"""Rows of the papers' ablation tables: each a recipe with overrides, under a name. Imports no torch.

`recipes/ablations.yaml` is a list of them; `ablation:ml_mamba/table7/csm` stands where a recipe's name may, but not as
the `base:` of another.
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
    """One row of a table: its fields are the schema.

    Args:
        table: of the paper, e.g. `table7`.
        row: a name for it, e.g. `csm`.
        recipe: name of the recipe that it starts from.
        overrides: `"a.b=c"`, applied one by one.
        published: the paper's figures by benchmark.
        note: what a reader of the figures must know.
    """

    table: Name
    row: Name
    recipe: Name
    overrides: list[str]
    published: dict[str, float]
    note: str = ""

    @property
    def name(self) -> str:
        """`ml_mamba/table7/csm`."""
        return f"{self.recipe}/{self.table}/{self.row}"

    @property
    def run(self) -> str:
        """The name as a run folder can have it: `ml_mamba-table7-csm`."""
        return re.sub(r"[/.]", "-", self.name)


def read_ablations(path: Path) -> list[Ablation]:
    """The entries of a file, in its order.

    Raises:
        RecipeError: it is no list of entries, has none, or two have one name; every problem is listed.
    """
    listed = read_yaml(path)
    if not isinstance(listed, list):
        raise RecipeError([Problem("", "ablations are a list of entries; this is none")], str(path))
    if not listed:
        raise RecipeError([Problem("", "the list has no entry; write at least one, or check a recipe")], str(path))
    entries: dict[str, Ablation] = {}
    problems = []
    for number, node in enumerate(listed, 1):
        bound, found = bind(node, Ablation, f"entry {number}", label="an ablation")
        problems += found
        if not found:
            entry: Ablation = bound()
            if entry.run in entries:
                other = entries[entry.run].name
                problems.append(Problem(f"entry {number}", f"{entry.name} would run in the folder of {other}"))
            entries.setdefault(entry.run, entry)
    if problems:
        raise RecipeError(problems, str(path))
    return list(entries.values())


@functools.cache
def shipped_ablations() -> list[Ablation]:
    """The entries that come with the package."""
    found = [folder / ABLATIONS_FILE for folder in shipped_folders() if (folder / ABLATIONS_FILE).is_file()]
    return read_ablations(found[0]) if found else []


def find_ablation(name: str) -> Ablation:
    """The shipped entry of that name, written with or without `ablation:`.

    Raises:
        RecipeError: there is none; names the nearest, and all others.
    """
    entries = {entry.name: entry for entry in shipped_ablations()}
    name = name.removeprefix(PREFIX)
    if name not in entries:
        raise RecipeError([Problem("", f"no ablation named {name!r}.{nearest(name, entries)}")], PREFIX + name)
    return entries[name]
