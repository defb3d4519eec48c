"""Recipe files: lookup by name among shipped recipes and those of plugins; reading YAML. Imports no torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from yaml import YAMLError

from ssmvl.errors import Problem, RecipeError, UnknownComponentError, nearest
from ssmvl.plugins import components
from ssmvl.recipes.yaml_loader import parse

ABLATIONS_FILE = "ablations.yaml"


def shipped_folders() -> list[Path]:
    """Return the directories of shipped recipes: the installed one, and the checkout's if there is one."""
    package, checkout = Path(__file__).parents[1], Path(__file__).parents[2]
    return [package / "_recipes", *([checkout / "recipes"] if (checkout / "pyproject.toml").is_file() else [])]


def read_yaml(path: Path) -> Any:
    """Read a YAML file as plain data; see `ssmvl.recipes.yaml_loader.parse`.

    Raises:
        RecipeError: the file cannot be read, or a mapping has a duplicate key.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (YAMLError, OSError, ValueError) as error:
        raise RecipeError([Problem("", f"cannot be read: {error}")], str(path)) from error


def recipe_path(name: str) -> Path:
    """Return the path of a recipe. The installed copy comes first, then the checkout's, then a plugin's.

    Raises:
        RecipeError: no recipe has that name.
    """
    for folder in shipped_folders():
        if (folder / f"{name}.yaml").is_file() and f"{name}.yaml" != ABLATIONS_FILE:
            return folder / f"{name}.yaml"
    try:
        entry = components().find("recipe", name)
    except UnknownComponentError as error:
        problem = f"unknown recipe {name!r}, and no such file exists.{nearest(name, recipe_names())}"
        raise RecipeError([Problem("", line) for line in (problem, *map(str, components().failures))], name) from error
    package, _, rest = str(entry.target).partition("/")
    spec = find_spec(package.partition(".")[0])  # does not import the package
    for root in (spec and spec.submodule_search_locations) or []:
        if (Path(root) / rest).is_file():
            return Path(root) / rest
    raise RecipeError([Problem("", f"{entry} is registered as {entry.target}, which does not exist")], name)


def recipe_names() -> list[str]:
    """List the names that `recipe_path` finds."""
    shipped = {
        path.stem for folder in shipped_folders() for path in folder.glob("*.yaml") if path.name != ABLATIONS_FILE
    }
    return sorted(shipped | set(components().names("recipe")))
