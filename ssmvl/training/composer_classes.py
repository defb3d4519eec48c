"""Composer's callbacks and loggers by name: found, and their options checked. Imports no Composer until asked."""

from __future__ import annotations

import importlib
import inspect
from importlib.util import find_spec
from typing import Any, Literal

from ssmvl.errors import Problem, nearest


def composer_class(kind: Literal["callbacks", "loggers"], name: str) -> Any:
    """The class of that name in `composer.callbacks` or `composer.loggers`, or None."""
    return getattr(importlib.import_module(f"composer.{kind}"), name, None)


def check_composer(path: str, stage: dict[str, Any], notes: list[str]) -> list[Problem]:
    """Names and options of the stage's callbacks and loggers, where Composer is there to say which there are."""
    problems = []
    for kind in ("callbacks", "loggers"):
        wanted = stage.get(kind)
        if not isinstance(wanted, dict) or not wanted:
            continue
        if find_spec("composer") is None:
            notes.append(f"{path}.{kind}: not checked, Composer is not installed")
            continue
        for name, options in wanted.items():
            problems += _check_call(f"{path}.{kind}.{name}", kind, str(name), options or {})
    return problems


def _check_call(path: str, kind: Any, name: str, options: Any) -> list[Problem]:
    if name == "CheckpointSaver":
        return [Problem(path, "a stage has one; say how with its keys checkpoint and keep, and where with checkpoints")]
    found = composer_class(kind, name)
    if not inspect.isclass(found):
        names = [n for n, c in vars(importlib.import_module(f"composer.{kind}")).items() if inspect.isclass(c)]
        return [Problem(path, f"composer.{kind} has no class {name!r}.{nearest(name, names)}")]
    if not isinstance(options, dict):
        return [Problem(path, f"expected a mapping of options, received {options!r}")]
    signature = inspect.signature(found)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if inspect.Parameter.VAR_KEYWORD not in kinds.values():
        allowed = [n for n, k in kinds.items() if k is not inspect.Parameter.VAR_POSITIONAL]
        unknown = [key for key in options if key not in allowed]
        if unknown:
            return [
                Problem(f"{path}.{key}", f"{name} has no option {key!r}.{nearest(key, allowed)}") for key in unknown
            ]
    try:
        signature.bind(**options)
    except TypeError as error:
        return [Problem(path, f"{name}: {error}")]
    return []
