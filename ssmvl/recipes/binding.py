"""Binding: check the options in a recipe's node against a factory's signature and bind them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass, make_dataclass
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssmvl.errors import Problem, SsmvlError, foreign, nearest
from ssmvl.plugins import components
from ssmvl.registry import INJECTED, Check, Entry, Part


class Bound:
    """Factory with its options bound. Calling it with the injected arguments of its kind builds the component.

    Attributes:
        label: description for messages, e.g. "connector 'mlp' (ssmvl)".
        path: YAML path of the node.
        node: the node, `{name: …, options}`; empty unless this is a registered component.
        entry: the registered component; None if this is not one.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        options: Mapping[str, Any],
        label: str,
        path: str = "",
        node: Mapping[str, Any] | None = None,
        entry: Entry | None = None,
    ) -> None:
        self.factory, self.options, self.label = factory, dict(options), label
        self.path, self.node, self.entry = path, dict(node or {}), entry

    def __call__(self, *args: Any, **injected: Any) -> Any:
        """Build the component, or evaluate it if it is a scan order."""
        built = self.factory(*args, **injected, **self.options)
        if (record := _BUILT.get()) is not None:
            record.append((self, built))
        return built

    def components(self) -> Iterator[Bound]:
        """Yield this component, if registered, and the registered components among its options."""
        if self.entry is not None:
            yield self
        for value in self.options.values():
            yield from components_in(value)

    def __str__(self) -> str:
        return self.label


_BUILT: ContextVar[list[tuple[Bound, Any]] | None] = ContextVar("built", default=None)


@contextmanager
def made_components() -> Iterator[list[tuple[Bound, Any]]]:
    """Record each bound component that is called within the context, with its result."""
    record: list[tuple[Bound, Any]] = []
    token = _BUILT.set(record)
    try:
        yield record
    finally:
        _BUILT.reset(token)


def components_in(value: Any) -> Iterator[Bound]:
    """Yield the registered components in a bound value, which may be a component, a mapping or a dataclass."""
    if isinstance(value, Bound):
        yield from value.components()
    elif isinstance(value, Mapping):
        yield from (bound for item in value.values() for bound in components_in(item))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (bound for item in vars(value).values() for bound in components_in(item))


def bind(
    node: Any,
    factory: Callable[..., Any],
    path: str,
    injected: Iterable[str] = (),
    label: str | None = None,
    entry: Entry | None = None,
) -> tuple[Bound, list[Problem]]:
    """Check the options in `node` against the signature of `factory` and bind them.

    A parameter annotated with `Part(kind)` takes a component, which is bound recursively, as are mappings of parts and
    dataclasses. No component is built. If there are problems, the result must not be called.
    """
    label = label or str(getattr(factory, "__name__", factory))
    if not isinstance(node, dict):
        return Bound(factory, {}, label), [Problem(path, f"expected a mapping of options, received {node!r}")]
    injected = tuple(injected)
    try:
        parameters = _parameters(factory)
    except Exception as error:  # evaluating a third-party annotation may raise anything
        return Bound(factory, {}, label), [Problem(path, f"the signature of {label} cannot be read: {foreign(error)}")]
    allowed = {name: p for name, p in parameters.items() if name not in injected}
    options: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in node.items():
        where = f"{path}.{key}" if path else str(key)
        if key in injected:
            problems.append(Problem(where, f"{key!r} is not an option: the library passes it; remove it"))
        elif key not in allowed:
            problems.append(Problem(where, f"{label} has no option {key!r}.{nearest(str(key), allowed)}"))
        else:
            options[key], errors = _bind_value(value, allowed[key].annotation, where)
            problems += errors
    for name, parameter in allowed.items():
        if name not in node and parameter.default is parameter.empty:
            where = f"{path}.{name}" if path else name
            problems.append(Problem(where, f"{label} needs {name!r} ({_describe(parameter.annotation)})"))
    named = {} if entry is None else {"name": entry.name, **node}
    return Bound(factory, options, label, path, named, entry), problems


class Option(NamedTuple):
    """Option of a component, formatted for users. `default` is empty for required options."""

    name: str
    type: str
    default: str


def options_of(factory: Callable[..., Any], injected: Iterable[str] = ()) -> list[Option]:
    """List the options of a component or of a part of a recipe."""
    options = []
    for name, parameter in _parameters(factory).items():
        if name not in injected:
            default = parameter.default
            shown = getattr(default, "__name__", None) or ("{}" if "factory" in repr(default) else repr(default))
            options.append(Option(name, _describe(parameter.annotation), "" if default is parameter.empty else shown))
    return options


def bind_part(node: Any, kind: str, path: str) -> tuple[Bound, list[Problem]]:
    """Bind a component written as a name or as `{name: …, options}`."""
    node = {"name": node} if isinstance(node, str) else node
    unusable = Bound(dict, {}, kind)
    names = components().names(kind)
    if not isinstance(node, dict) or not isinstance(node.get("name"), str):
        message = (
            f"expected the name of a {kind} or {{name: …, options}}, received {node!r}. Allowed: {', '.join(names)}."
        )
        return unusable, [Problem(path, message)]
    try:
        entry = components().find(kind, node["name"])
        factory = entry.load()
    except SsmvlError as error:
        return unusable, [Problem(path, str(error))]
    except (Exception, SystemExit) as error:  # importing third-party code may raise anything
        return unusable, [Problem(path, f"{entry} cannot be imported: {foreign(error)}")]
    options = {key: value for key, value in node.items() if key != "name"}
    return bind(options, factory, path, INJECTED[kind], str(entry), entry)


def _bind_value(value: Any, hint: Any, path: str) -> tuple[Any, list[Problem]]:
    if value is None and type(None) in typing.get_args(hint):
        return None, []
    hint = _without_none(hint)
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Part):
            return bind_part(value, mark.kind, path)
        if isinstance(mark, Check):
            converted, problems = _bind_value(value, hint.__origin__, path)
            if not problems and not mark.holds(converted):
                problems = [Problem(path, f"must be {mark.allowed}, received {value!r}")]
            return converted, problems
    if is_dataclass(hint) and isinstance(hint, type):
        bound, problems = bind(value, hint, path)
        return (None if problems else bound()), problems
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is dict and (is_dataclass(arguments[1]) or hasattr(arguments[1], "__metadata__")):
        if not isinstance(value, dict) or not value:
            return {}, [Problem(path, f"expected a mapping with at least one entry, received {value!r}")]
        pairs = {key: _bind_value(item, arguments[1], f"{path}.{key}") for key, item in value.items()}
        return {key: v for key, (v, _) in pairs.items()}, [p for _, problems in pairs.values() for p in problems]
    return _convert(value, hint, path)


def _convert(value: Any, hint: Any, path: str) -> tuple[Any, list[Problem]]:
    """Check and convert a plain value against its annotation with OmegaConf's typed nodes."""
    mismatch = [Problem(path, f"expected {_describe(hint)}, received {value!r} ({type(value).__name__})")]
    if isinstance(value, str) and (value == "???" or "${" in value):  # OmegaConf accepts these markers as any type
        return (value, []) if hint in (str, Any) and value != "???" else (None, mismatch)
    if (unquoted := _unquoted_text(value, hint)) is not None:
        message = f"expected text, received {unquoted!r} ({type(unquoted).__name__}); put it in quotes"
        return None, [Problem(path, message)]
    try:
        schema = OmegaConf.structured(make_dataclass("Schema", [("value", hint)]))
        node = OmegaConf.to_container(OmegaConf.merge(schema, {"value": value}))
    except (OmegaConfBaseException, ValueError, TypeError):
        return None, mismatch
    converted = typing.cast("dict[str, Any]", node)["value"]
    return (tuple(converted) if typing.get_origin(hint) is tuple else converted), []


def _unquoted_text(value: Any, hint: Any) -> Any:
    """Return the first boolean or float where text is expected. Its original spelling is lost."""
    if hint is str and isinstance(value, bool | float):
        return value
    if str in typing.get_args(hint) and isinstance(value, list | tuple):
        return next((item for item in value if isinstance(item, bool | float)), None)
    return None


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    annotated: Any = factory
    if isinstance(factory, type) and not is_dataclass(factory):  # fields of a dataclass may come from other modules
        annotated = typing.cast(Any, factory).__init__
    hints = typing.get_type_hints(annotated, include_extras=True)
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {n: p for n, p in inspect.signature(factory).parameters.items() if p.kind in plain}
    return {name: p.replace(annotation=hints.get(name, Any)) for name, p in parameters.items()}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [a for a in typing.get_args(hint) if a is not type(None)]
        return others[0] if len(others) == 1 else hint
    return hint


def _describe(hint: Any, inside: bool = False) -> str:
    """Describe a type for users. `inside` another type, the limits of a `Check` are omitted."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    for mark in getattr(hint, "__metadata__", ()):
        plain = _describe(hint.__origin__, inside)
        return f"a {mark.kind}" if isinstance(mark, Part) else plain if inside else f"{plain}, {mark.allowed}"
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_describe(item, inside) for item in inner)
    if origin in (dict, list, tuple):
        return f"{origin.__name__}[{', '.join('...' if item is ... else _describe(item, True) for item in inner)}]"
    if hint is types.NoneType:
        return "None"
    return hint.__name__ if isinstance(hint, type) and not inner else str(hint).replace("typing.", "")
