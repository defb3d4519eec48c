"""Settings of a model that its tensors do not show, and their comparison: module types and the values they keep."""

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

# Torch's state of training, and what timm and transformers note beside a model and compute nothing with.
NOTES = {"training", "pretrained_cfg", "default_cfg", "generation_config"}
SHOWN = 20  # differences that a message lists
FUNCTIONS = (partial, Bound, FunctionType, BuiltinFunctionType, MethodType, type)
VALUES = (bool, int, float, str, torch.dtype)


def module_settings(module: nn.Module) -> dict[str, object]:
    """The kind of each submodule and the plain values that it keeps, by dotted name; no tensors.

    Plain are truth values, numbers, texts, dtypes, tuples, lists (as tuples), and functions with the options bound to
    them (as a text). Mappings and other objects are walked, each where it is met first. Private names are left out.

    Args:
        module: may be on `meta`.
    """
    found: dict[str, object] = {}
    seen: set[int] = set()
    for name, part in module.named_modules():
        found[name] = _name(type(part))
        found |= _kept(f"{name}." if name else "", vars(part), seen)
    return found


def require_same(
    what: str,
    own: Mapping[str, object],
    needed: Mapping[str, object],
    advice: str = "",
    other: str = "the checkpoint",
) -> None:
    """Compare settings of a model with those that weights need.

    Args:
        what: the first line of the message.
        own: the model's, by dotted name.
        needed: those that the weights were saved with, or that their config states.
        advice: the last line of the message.
        other: where `needed` comes from.

    Raises:
        CheckpointError: they differ; lists every difference.
    """
    if lines := differing(own, needed, other):
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        listed = "\n  ".join([f"{what}:", *lines[:SHOWN], *more])
        raise CheckpointError(f"{listed}\n{advice}" if advice else listed)


def differing(own: Mapping[str, object], needed: Mapping[str, object], other: str = "the checkpoint") -> list[str]:
    """One line for each setting that differs, without those inside of a module that differs itself."""
    wrong: list[str] = []
    for name in dict.fromkeys([*own, *needed]):
        if own.get(name) != needed.get(name) and not name.startswith(tuple(f"{outer}." for outer in wrong)):
            wrong.append(name)
    return [f"{name} is {_shown(own, name)}, {other} needs {_shown(needed, name)}" for name in wrong]


def _shown(settings: Mapping[str, object], name: str) -> str:
    value = settings.get(name, _shown)
    return "nothing" if value is _shown else short(str(value) if callable(value) else repr(value))


def _kept(prefix: str, values: Mapping[Any, Any], seen: set[int]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if str(key).startswith("_") or key in NOTES or (key == "approximate" and value == "none"):
            continue  # `none` is what torch's GELU says of itself, and timm's equal one does not
        if isinstance(value, (*VALUES, *FUNCTIONS, tuple, list)):
            yield f"{prefix}{key}", _plain(value)
        elif not isinstance(value, Tensor | nn.Module) and id(value) not in seen:
            seen.add(id(value))
            inside = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
            yield from _kept(f"{prefix}{key}.", inside, seen)


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
    """`package.function(option=value)`, defaults written out."""
    options: dict[str, Any] = {}
    while isinstance(function, partial | Bound):
        if isinstance(function, partial):
            first = {str(place): value for place, value in enumerate(function.args)}
            function, options = function.func, {**first, **function.keywords, **options}
        else:
            function, options = function.factory, {**function.options, **options}
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C
        parameters = []
    usual = {found.name: found.default for found in parameters if found.default is not found.empty}
    shown = ", ".join(f"{name}={_plain(value)!r}" for name, value in sorted({**usual, **options}.items()))
    return f"{_name(function)}({shown})" if shown else _name(function)


def _name(kind: Any) -> str:
    """Of a class or a function, with its module; torch's and timm's without, because both have one GELU."""
    package, name = getattr(kind, "__module__", None) or "", str(getattr(kind, "__qualname__", kind))
    return name if package.partition(".")[0] in ("", "torch", "timm") else f"{package}.{name}"
