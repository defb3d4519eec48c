"""Settings of a model that its tensors do not show (module types and attributes), and their comparison."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ssmvl.errors import CheckpointError, short
from ssmvl.recipes.binding import Bound

# The training flag, and attributes that timm and transformers attach to a model but do not compute with.
NOTES = {"training", "pretrained_cfg", "default_cfg", "generation_config"}
SHOWN = 20  # maximum number of differences in a message
FUNCTIONS = (partial, Bound, FunctionType, BuiltinFunctionType, MethodType, type)
VALUES = (bool, int, float, str, torch.dtype)


def module_settings(module: nn.Module) -> dict[str, object]:
    """Collect each submodule's type and plain attributes, by dotted name.

    Plain values are booleans, numbers, strings, dtypes, tuples, lists (as tuples), and functions with their bound
    options (as strings). Mappings and other objects are traversed once, at the first reference. Tensors and private
    attributes are omitted.

    Args:
        module: may be on `meta`.
    """
    settings: dict[str, object] = {}
    seen: set[int] = set()
    for name, part in module.named_modules():
        settings[name] = _name(type(part))
        settings |= _attributes(f"{name}." if name else "", vars(part), seen)
    return settings


def require_same(
    what: str,
    own: Mapping[str, object],
    needed: Mapping[str, object],
    advice: str = "",
    other: str = "the checkpoint",
) -> None:
    """Check that a model has the settings that its weights need.

    Args:
        what: first line of the message.
        own: the model's settings, by dotted name.
        needed: settings that the weights were saved with, or that their config states.
        advice: last line of the message.
        other: source of `needed`, for the message.

    Raises:
        CheckpointError: settings differ; lists the first `SHOWN` differences and counts the others.
    """
    if lines := differing(own, needed, other):
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        listed = "\n  ".join([f"{what}:", *lines[:SHOWN], *more])
        raise CheckpointError(f"{listed}\n{advice}" if advice else listed)


def differing(own: Mapping[str, object], needed: Mapping[str, object], other: str = "the checkpoint") -> list[str]:
    """Describe each differing setting in one line. Skip settings inside a module whose own type differs."""
    different: list[str] = []
    for name in dict.fromkeys([*own, *needed]):
        if own.get(name) != needed.get(name) and not name.startswith(tuple(f"{outer}." for outer in different)):
            different.append(name)
    return [
        f"{name} is {_shown(own[name]) if name in own else 'not set'}, "
        f"{other} {f'needs {_shown(needed[name])}' if name in needed else 'has none'}"
        for name in different
    ]


def _shown(value: object) -> str:
    return short(str(value) if callable(value) else repr(value))


def _attributes(prefix: str, values: Mapping[Any, Any], seen: set[int]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if str(key).startswith("_") or key in NOTES or (key == "approximate" and value == "none"):
            continue  # torch's GELU has approximate="none"; timm's equivalent has no such attribute
        if isinstance(value, (*VALUES, *FUNCTIONS, tuple, list)):
            yield f"{prefix}{key}", _plain(value)
        elif not isinstance(value, Tensor | nn.Module) and id(value) not in seen:
            seen.add(id(value))
            inner = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
            yield from _attributes(f"{prefix}{key}.", inner, seen)


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        make = getattr(value, "_make", tuple)  # a named tuple stays one
        return make(map(_plain, value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, FUNCTIONS):
        return _with_options(value)
    return value if value is None or isinstance(value, VALUES) else _name(type(value))


def _with_options(function: Any) -> str:
    """Format a function as `package.function(option=value)`, defaults included."""
    options: dict[str, Any] = {}
    while isinstance(function, partial | Bound):
        if isinstance(function, partial):
            positional = {str(index): value for index, value in enumerate(function.args)}
            function, options = function.func, {**positional, **function.keywords, **options}
        else:
            function, options = function.factory, {**function.options, **options}
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C
        parameters = []
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    shown = ", ".join(f"{name}={_plain(value)!r}" for name, value in sorted({**defaults, **options}.items()))
    return f"{_name(function)}({shown})" if shown else _name(function)


def _name(kind: Any) -> str:
    """Name a class or function with its Python module, except in torch and timm, whose GELUs are equivalent."""
    package, name = getattr(kind, "__module__", None) or "", str(getattr(kind, "__qualname__", kind))
    return name if package.partition(".")[0] in ("", "torch", "timm") else f"{package}.{name}"
