"""Merge recipes: YAML files and dotted overrides -> plain data. Imports no torch."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ssmvl.errors import Problem, RecipeError, nearest, short
from ssmvl.recipes.ablations import PREFIX, Ablation, find_ablation
from ssmvl.recipes.files import read_yaml, recipe_path
from ssmvl.recipes.norm_groups import is_saved, write_out
from ssmvl.recipes.yaml_loader import parse

__all__ = ["Recipe", "load_recipe"]

GROUPS = {("stages",): "stage", ("model", "encoders"): "encoder"}  # mappings in which null removes an entry
TOP_LEVEL = ("run", "seed", "model", "stages", "stage", "checkpoints", "evaluation")


@dataclass(frozen=True)
class Recipe:
    """Merged recipe as plain data, not yet checked.

    Attributes:
        data: mappings, lists and scalars, with the keys `run`, `seed`, `model` and usually `stages` and `evaluation`.
        source: the recipe's file, for messages.
    """

    data: dict[str, Any]
    source: str

    def to_yaml(self) -> str:
        """Write the merged recipe as YAML, with `norm_groups` explicit. `load_recipe` of it gives the same model."""
        return OmegaConf.to_yaml(OmegaConf.create(_escape(write_out(self.data))))


def load_recipe(recipe: str | Path | Recipe | Ablation, *overrides: str) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        recipe: a name (`quickstart`), a YAML file, a directory that contains `recipe.yaml`, a `Recipe`, or an ablation
            (`ablation:ml_mamba/table7/csm`), whose overrides are applied first.
        overrides: `"a.b=value"`, applied one by one; the value is YAML.

    Raises:
        RecipeError: the recipe or an override is invalid. Lists every problem.
    """
    if isinstance(recipe, str) and recipe.startswith(PREFIX):
        recipe = find_ablation(recipe)
    if isinstance(recipe, Recipe):
        data, source = _escape(recipe.data), recipe.source
    elif isinstance(recipe, Ablation):
        data, source = _read_with_bases(recipe_path(recipe.recipe)), PREFIX + recipe.name
        data, overrides = {**data, "run": recipe.run}, (*recipe.overrides, *overrides)
    else:
        path = _find(str(recipe))
        data, source = _read_with_bases(path), str(path)
        data.setdefault("run", path.stem if path.name != "recipe.yaml" else path.parent.name)
    data = _normalize({"seed": 0, **_apply_overrides(data, overrides, source)})
    unknown = [
        Problem(key, f"unknown part of a recipe.{nearest(key, TOP_LEVEL)}") for key in data if key not in TOP_LEVEL
    ]
    if unknown:
        raise RecipeError(unknown, source)
    if not isinstance(data.get("model"), dict):
        raise RecipeError([Problem("model", "a recipe must have a mapping `model:`")], source)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError([Problem(str(error.full_key or ""), _first_line(error))], source) from error
    return Recipe(typing.cast("dict[str, Any]", resolved), source)


def merge(base: Any, over: Any, plain: bool = False) -> Any:
    """Merge `over` onto `base`: mappings key by key. A component whose name changes loses the options of the old one.

    Both may write a component as a name or as `{name: …, options}`. Values under `callbacks` and `loggers` are `plain`:
    their key `name` is an ordinary option.
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


def _normalize(data: dict[str, Any]) -> dict[str, Any]:
    """Write components as `{name: …}`, drop encoders and stages that are null, and sort stages by `order`."""

    def named(node: Any) -> Any:
        return {"name": node} if isinstance(node, str) else node

    def map_values(mapping: Any, change: Callable[[Any], Any], keys: Iterable[str] | None = None) -> Any:
        if not isinstance(mapping, dict):
            return mapping
        return {k: change(v) if keys is None or k in keys else v for k, v in mapping.items()}

    def stage_like(node: Any) -> Any:
        return map_values(node, named, ("data", "prompt"))

    def present(mapping: Any) -> Any:
        return {k: v for k, v in mapping.items() if v is not None} if isinstance(mapping, dict) else mapping

    model = map_values(data.get("model"), named, ("fusion", "connector", "language", "prompt"))
    if isinstance(model, dict) and "encoders" in model:
        model = {**model, "encoders": map_values(present(model["encoders"]), named)}
    original = data.get("stages")
    stages = map_values(present(original), stage_like)
    if isinstance(stages, dict) and "order" in stages:
        order, entries = stages["order"], {name: stages[name] for name in stages if name != "order"}
        if isinstance(order, list):
            removed = [name for name, stage in typing.cast("dict[str, Any]", original).items() if stage is None]
            order = [name for name in order if name not in removed]
        if isinstance(order, list) and sorted(map(str, order)) == sorted(entries):
            stages = {name: entries[name] for name in order}
    rest = {"stages": stages, "evaluation": stage_like(data.get("evaluation"))}
    return {**data, "model": model, **{key: value for key, value in rest.items() if key in data}}


def _find(name: str) -> Path:
    path = Path(name)
    try:
        path.exists()
    except OSError as error:
        raise RecipeError([Problem("", f"not the name of a recipe or file ({error.strerror})")], short(name)) from error
    if (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError([Problem("", f"{path} does not exist")], name)
        return path
    return recipe_path(name)


def _read(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        message = "a recipe must be a mapping with `model:` and `stages:`"
        if isinstance(data, list):
            message += f". A list of ablations is checked with `ssmvl check FILE`; an entry is used as {PREFIX}NAME"
        raise RecipeError([Problem("", message)], str(path))
    return typing.cast("dict[str, Any]", write_out(data, saved=True) if is_saved(path) else data)


def _read_with_bases(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe file and merge it onto its bases, recursively."""
    data = _read(path)
    if "base" not in data:
        return data
    name = data.pop("base")
    if not isinstance(name, str):
        raise RecipeError([Problem("base", f"expected a recipe's name or file, received {name!r}")], str(path))
    try:
        base = _find(str(path.parent / name) if (path.parent / name).is_file() else name)
    except RecipeError as error:
        problems = [Problem("base", str(problem)) for problem in error.problems]
        raise RecipeError(problems, str(path)) from error
    children = (*children, path.resolve())
    if base.resolve() in children:
        chain = " -> ".join(map(str, (*children, base.resolve())))
        raise RecipeError([Problem("base", f"circular bases: {chain}")], str(path))
    base_data = _read_with_bases(base, children)
    if problems := [*_ineffective_nulls(base_data, data), *_ineffective_mappings(base_data, data)]:
        raise RecipeError(problems, str(path))
    return typing.cast("dict[str, Any]", merge(base_data, data))


def _apply_overrides(data: dict[str, Any], overrides: Iterable[str], source: str) -> dict[str, Any]:
    """Apply overrides to a recipe, one by one."""
    problems: list[Problem] = []
    partial: dict[str, Problem] = {}  # unknown stages and encoders of which only single keys are overridden
    for override in overrides:
        path, value = _parse_override(override, source)
        over: Any = value
        for part in reversed(path):
            over = {part: over}
        problems += _ineffective_nulls(data, over)
        problems += _ineffective_mappings(data, over)
        for group, noun in GROUPS.items():
            known = _at(data, group)
            if path[: len(group)] == group and len(path) > len(group) + 1 and isinstance(known, dict):
                name = path[len(group)]
                if name not in known and name != "order":
                    message = f"{_unknown(noun, name, known)} To add one, set the whole entry"
                    partial.setdefault(".".join((*group, name)), Problem(".".join(path), message))
        data = merge(data, over)
    for name, problem in partial.items():
        entry = _at(data, tuple(name.split(".")))
        if isinstance(entry, dict) and not entry.keys() & {"name", "data"}:
            problems.append(problem)
    if problems:
        raise RecipeError(problems, source)
    return data


def _ineffective_nulls(data: dict[str, Any], over: dict[str, Any]) -> list[Problem]:
    """Find stages and encoders that are set to null but are not in the recipe."""
    problems = []
    for group, noun in GROUPS.items():
        known, changes = _at(data, group), _at(over, group)
        if isinstance(known, dict) and isinstance(changes, dict):
            problems += [
                Problem(".".join((*group, str(name))), _unknown(noun, str(name), known))
                for name, value in changes.items()
                if value is None and name not in known and name != "order"
            ]
    return problems


def _unknown(noun: str, name: str, known: Iterable[str]) -> str:
    return f"unknown {noun} {name!r}.{nearest(name, set(known) - {'order'})}"


def _ineffective_mappings(data: Any, over: Any, path: tuple[str, ...] = ()) -> list[Problem]:
    """Find empty mappings that are merged onto other mappings, which changes nothing."""
    if not (isinstance(data, dict) and isinstance(over, dict) and data):
        return []
    if not over:
        message = "mappings are merged, so an empty one changes nothing; to remove an entry, set it to null"
        return [Problem(".".join(path), message)]
    return [problem for key in over for problem in _ineffective_mappings(data.get(key), over[key], (*path, str(key)))]


def _at(data: Any, path: Sequence[str]) -> Any:
    """Return the value at a path of keys, or None."""
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _parse_override(text: str, source: str) -> tuple[tuple[str, ...], Any]:
    """Split `a.b=value` into the path and the parsed value."""
    key, equals, value = text.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(part and not part.startswith("-") for part in parts):
        problem = f"{text!r} is not an override; write key=value with a dotted key, e.g. stages.finetune.batch=128"
        if text.startswith("-"):
            problem += "; options of the launcher go before the recipe"
        raise RecipeError([Problem("", problem)], source)
    try:
        parsed = parse(value) if value.strip() else None
        if key_only := next(_keys_without_values(parsed), None):
            raise YAMLError(f"{key_only!r} is parsed as a key without a value")
        return parts, parsed
    except YAMLError as error:
        advice = "; put a space after the ':' of a mapping" if re.search(r":[^\s/]", value) else ""
        raise RecipeError(
            [Problem(key, f"{value!r} is not a YAML value: {_first_line(error)}{advice}")], source
        ) from error


def _keys_without_values(node: Any) -> Iterator[str]:
    """Yield keys such as `name:mlp`, into which YAML parses `{name:mlp}`."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if value is None and ":" in str(key):
            yield str(key)
        yield from _keys_without_values(value)


def _escape(node: Any) -> Any:
    """Escape `${` in resolved text, so that it is not resolved a second time."""
    if isinstance(node, dict):
        return {key: _escape(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escape(value) for value in node]
    return node.replace("${", "\\${") if isinstance(node, str) else node


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
