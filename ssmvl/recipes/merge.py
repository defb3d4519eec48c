"""Recipes: YAML and dotted overrides -> plain data. Imports no torch."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ssmvl.errors import Problem, RecipeError, nearest
from ssmvl.recipes.ablations import PREFIX, Ablation, find_ablation
from ssmvl.recipes.files import read_yaml, recipe_path

__all__ = ["Recipe", "load_recipe"]

TOP_LEVEL = ("run", "seed", "model", "stages", "stage", "checkpoints", "evaluation")


@dataclass(frozen=True)
class Recipe:
    """A merged recipe: plain data that nothing has interpreted yet.

    Attributes:
        data: mappings, lists and scalars, with the keys `run`, `seed`, `model`, and mostly `stages`, `evaluation`.
        source: the file it came from, for messages.
    """

    data: dict[str, Any]
    source: str

    def to_yaml(self) -> str:
        """The merged recipe as YAML; `load_recipe` of it gives an equal recipe."""
        return OmegaConf.to_yaml(OmegaConf.create(_escape(self.data)))


def load_recipe(recipe: str | Path | Recipe | Ablation, *overrides: str) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        recipe: a name (`quickstart`), a YAML file, a folder that holds `recipe.yaml`, or a recipe; or a row of a
            paper's table (`ablation:ml_mamba/table7/csm`), whose recipe is read and whose overrides come first.
        overrides: `"a.b=value"`, applied one by one; the value is YAML.

    Raises:
        RecipeError: it is no recipe, or an override is none; every problem is listed.
    """
    if isinstance(recipe, str) and recipe.startswith(PREFIX):
        recipe = find_ablation(recipe)
    if isinstance(recipe, Recipe):
        data, source = _escape(recipe.data), recipe.source
    elif isinstance(recipe, Ablation):
        data, source = _read_with_base(recipe_path(recipe.recipe)), PREFIX + recipe.name
        data, overrides = {**data, "run": recipe.run}, (*recipe.overrides, *overrides)
    else:
        path = _find(str(recipe))
        data, source = _read_with_base(path), str(path)
        data.setdefault("run", path.stem if path.name != "recipe.yaml" else path.parent.name)
    for override in overrides:
        data = merge(data, _parse_override(override, source))
    data = _normalise({"seed": 0, **data})
    unknown = [
        Problem(key, f"no such part of a recipe.{nearest(key, TOP_LEVEL)}") for key in data if key not in TOP_LEVEL
    ]
    if unknown:
        raise RecipeError(unknown, source)
    if not isinstance(data.get("model"), dict):
        raise RecipeError([Problem("model", "a recipe needs a mapping `model:`; this is no recipe")], source)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError([Problem(str(error.full_key or ""), _first_line(error))], source) from error
    return Recipe(typing.cast("dict[str, Any]", resolved), source)


def merge(base: Any, over: Any, plain: bool = False) -> Any:
    """`over` laid on `base`: mappings merge key by key; a component whose name changes drops its other options.

    A component may be written as a name or as `{name: …, options}`; either meets either. What lies under `callbacks`
    and `loggers` is `plain`: a key `name` there is an option like any other.
    """
    if not plain:
        if isinstance(base, str) and isinstance(over, dict):
            base = {"name": base}
        if isinstance(base, dict) and "name" in base and isinstance(over, str):
            over = {"name": over}
        if isinstance(base, dict) and isinstance(over, dict) and "name" in base:
            if over.get("name", base["name"]) != base["name"]:
                return over
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{k: merge(base.get(k), v, plain or k in ("callbacks", "loggers")) for k, v in over.items()}}


def _normalise(data: dict[str, Any]) -> dict[str, Any]:
    """Write every component that a recipe's fixed places hold as `{name: …}`; leave out encoders and stages of null."""

    def named(node: Any) -> Any:
        return {"name": node} if isinstance(node, str) else node

    def each(mapping: Any, change: Callable[[Any], Any], keys: Iterable[str] | None = None) -> Any:
        if not isinstance(mapping, dict):
            return mapping
        return {k: change(v) if keys is None or k in keys else v for k, v in mapping.items()}

    def holder(node: Any) -> Any:
        return each(node, named, ("data", "prompt"))

    def present(mapping: Any) -> Any:
        return {k: v for k, v in mapping.items() if v is not None} if isinstance(mapping, dict) else mapping

    model = each(data.get("model"), named, ("fusion", "connector", "language", "prompt"))
    if isinstance(model, dict) and "encoders" in model:
        model = {**model, "encoders": each(present(model["encoders"]), named)}
    rest = {"stages": each(present(data.get("stages")), holder), "evaluation": holder(data.get("evaluation"))}
    return {**data, "model": model, **{key: value for key, value in rest.items() if key in data}}


def _find(name: str) -> Path:
    path = Path(name)
    if (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError([Problem("", f"no such file: {path}")], name)
        return path
    return recipe_path(name)


def _read(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        what = "a recipe is a mapping with `model:` and `stages:`; this is no recipe"
        if isinstance(data, list):
            what += f". A list of ablations is checked with `ssmvl check FILE`; an entry is used as {PREFIX}NAME"
        raise RecipeError([Problem("", what)], str(path))
    return typing.cast("dict[str, Any]", data)


def _read_with_base(path: Path) -> dict[str, Any]:
    data = _read(path)
    if "base" not in data:
        return data
    if not isinstance(data["base"], str):
        problem = f"expected a recipe's name or file, received {data['base']!r}"
        raise RecipeError([Problem("base", problem)], str(path))
    base_path = _find(str(path.parent / data["base"]) if (path.parent / data["base"]).is_file() else data["base"])
    base = _read(base_path)
    if "base" in base:
        problem = f"{base_path} has a base itself; one level is allowed"
        raise RecipeError([Problem("base", problem)], str(path))
    del data["base"]
    return typing.cast("dict[str, Any]", merge(base, data))


def _parse_override(text: str, source: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or not all(part and not part.startswith("-") for part in parts):
        problem = f"{text!r} is no override; write key=value with a dotted key, e.g. stages.finetune.batch=128"
        if text.startswith("-"):
            problem += "; options of the launcher stand before the recipe"
        raise RecipeError([Problem("", problem)], source)
    try:
        node = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    except (YAMLError, OmegaConfBaseException) as error:
        advice = "; a space follows the ':' of a mapping" if re.search(r":[^\s/]", value) else ""
        raise RecipeError(
            [Problem(key, f"{value!r} is no YAML value: {_first_line(error)}{advice}")], source
        ) from error
    nested = typing.cast("dict[str, Any]", node)["value"]
    for part in reversed(parts):
        nested = {part: nested}
    return typing.cast("dict[str, Any]", nested)


def _escape(node: Any) -> Any:
    """`${` in resolved text is text: it must survive being resolved again."""
    if isinstance(node, dict):
        return {key: _escape(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escape(value) for value in node]
    return node.replace("${", "\\${") if isinstance(node, str) else node


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
