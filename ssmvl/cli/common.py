"""Arguments shared by several verbs, and checks that run before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmvl.errors import CheckpointError, MissingDependencyError, Problem, RecipeError, SsmvlError, short

if TYPE_CHECKING:
    from ssmvl.recipes.merge import Recipe

FIXED = {"fusion": "fusion", "connector": "connector", "language": "language_model", "prompt": "prompt"}
NESTED = {"mixer": "mixer", "scan_order": "scan_order"}  # options that hold components


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for a recipe and its overrides."""
    parser.add_argument("recipe", help="name of a recipe (see `ssmvl list`), or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, applied one by one")


def merged_recipe(options: argparse.Namespace) -> Recipe:
    """Load the recipe given on the command line with its overrides; check that its components and files exist.

    Raises:
        RecipeError: the recipe cannot be read, or names an unknown component or a missing file.
    """
    from ssmvl.recipes.merge import load_recipe

    recipe = load_recipe(options.recipe, *options.overrides)
    problems = [*_unknown_components(recipe.data), *_missing_files(recipe.data)]
    if problems:
        raise RecipeError(problems, recipe.source)
    return recipe


def positive_integer(text: str) -> int:
    """Parse an argument that must be an integer of at least 1."""
    return integer(text, 1)


def integer(text: str, minimum: int = 0) -> int:
    """Parse an argument that must be an integer of at least `minimum`.

    Raises:
        argparse.ArgumentTypeError: it is anything else.
    """
    if not (text.isascii() and text.isdigit() and int(text) >= minimum):
        raise argparse.ArgumentTypeError(f"must be an integer of at least {minimum}, received {text!r}")
    return int(text)


def require_packages(extra: str, *packages: str) -> None:
    """Check that packages are installed.

    Raises:
        MissingDependencyError: names the extra that installs them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"this command requires {' and '.join(missing)}: pip install 'ssmvl[{extra}]'")


def require_path(name: str, what: str) -> None:
    """Check that a local file or directory exists. URLs and Hub ids are not checked.

    Raises:
        CheckpointError: it does not exist.
    """
    if _is_missing(name):
        raise CheckpointError(f"{short(name)}: no such {what}")


def _is_missing(name: str) -> bool:
    is_local = name.startswith(("/", "./", "../", "~")) or name.count("/") != 1
    return is_local and "://" not in name and not _exists(name)


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # an unknown user (~x), or a name that no file can have
        return False


def _unknown_components(data: dict[str, Any]) -> Iterator[Problem]:
    model, stages = data["model"], data.get("stages")
    for name, node in (model.get("encoders") or {}).items() if isinstance(model.get("encoders"), dict) else ():
        yield from _unknown(f"model.encoders.{name}", "encoder", node)
    for key, kind in FIXED.items():
        yield from _unknown(f"model.{key}", kind, model.get(key))
    holders = {f"stages.{name}": stage for name, stage in stages.items()} if isinstance(stages, dict) else {}
    holders |= {f"{path}.evaluation": s.get("evaluation") for path, s in holders.items() if isinstance(s, dict)}
    for path, holder in {**holders, "evaluation": data.get("evaluation")}.items():
        for key, kind in (("data", "dataset"), ("prompt", "prompt")) if isinstance(holder, dict) else ():
            yield from _unknown(f"{path}.{key}", kind, holder.get(key))


def _unknown(path: str, kind: str, node: Any) -> Iterator[Problem]:
    """Yield a problem for a component that is not registered, or for each such component in its options."""
    from ssmvl.plugins import components

    node = {"name": node} if isinstance(node, str) else node
    if not isinstance(node, dict) or not isinstance(node.get("name"), str):
        return  # binding reports any other mistake
    try:
        entry = components().find(kind, node["name"])
    except SsmvlError as error:
        yield Problem(path, str(error))
        return
    if entry.plugin is None or entry.plugin.distribution == "ssmvl":  # in a plugin, these options may differ
        for key in NESTED.keys() & node.keys():
            yield from _unknown(f"{path}.{key}", NESTED[key], node[key])


def _missing_files(data: dict[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each path of weights that does not exist.

    Only paths with a leading `/`, `~`, `./` or `../` are checked; all others may be Hub ids.
    """
    model, stages = data["model"], data.get("stages")
    encoders = model.get("encoders") if isinstance(model.get("encoders"), dict) else {}
    nodes = {f"model.encoders.{name}": node for name, node in (encoders or {}).items()}
    named = {f"{path}.weights": node.get("weights") for path, node in nodes.items() if isinstance(node, dict)}
    if isinstance(model.get("language"), dict):
        named["model.language.weights"] = model["language"].get("weights")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if isinstance(stage, dict):
            named[f"stages.{name}.init_from"] = stage.get("init_from")
    for path, value in named.items():
        if isinstance(value, str):
            file = value.removeprefix("unwrap:").removeprefix("local-dir:")
            if file.startswith(("/", "~", "./", "../")) and not _exists(file):
                yield Problem(path, f"{short(file)}: no such file or directory")
