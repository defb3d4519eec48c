"""Registry of components, (kind, name) -> factory, and annotations for the parameters of components."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from ssmvl.errors import ContractError, DuplicateComponentError, UnknownComponentError, nearest

__all__ = ["Register", "Part", "Check", "Count", "Depth", "Pixels", "Seed", "Entry"]

MANUAL_SEED = 2**32  # torch seeds itself with 64 random bits; a smaller seed was set by hand

Register = Callable[[str, str, "str | Callable[..., Any]"], None]
"""Function passed to a plugin's hook: `register(kind, name, target)`, target a factory or "module:attribute"."""

# All component kinds, each with the arguments that the library passes when it builds or calls a component. These names
# are never options: writing one in a recipe is an error.
INJECTED: dict[str, tuple[str, ...]] = {
    "scan_order": ("grid",),
    "mixer": ("width", "num_paths"),
    "encoder": (),
    "fusion": ("widths", "grids"),
    "connector": ("in_width", "out_width", "grid"),
    "language_model": (),
    "prompt": (),
    "dataset": ("split",),
    "recipe": (),
    "checkpoint": ("names", "config"),
}


@dataclass(frozen=True)
class Part:
    """Annotation of a parameter that takes a component: `mixer: Annotated[Callable[..., Module], Part("mixer")]`.

    In a recipe such a parameter is written as a name or as `{name: …, options}`. The code receives a callable to which
    only the injected arguments of the kind are missing. `ssmvl.interfaces` has an alias for each kind (`MixerPart`,
    `ScanOrderPart`, …).
    """

    kind: str


@dataclass(frozen=True)
class Check:
    """Annotation that limits a parameter's values: `Annotated[int, Check("at least 1", lambda n: n >= 1)]`."""

    allowed: str
    holds: Callable[[Any], object]


Count = Annotated[int, Check("from 1 to 10^9", lambda number: 1 <= number <= 10**9)]
Depth = Annotated[int, Check("from 1 to 256", lambda number: 1 <= number <= 256)]
Pixels = Annotated[int, Check("from 1 to 4,096", lambda number: 1 <= number <= 4096)]
Seed = Annotated[int, Check("from 0 to 2^32 - 1", lambda number: 0 <= number < 2**32)]


class Plugin(NamedTuple):
    """Installed plugin: one entry point of a distribution."""

    distribution: str
    version: str
    name: str
    module: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.module})"


@dataclass(frozen=True)
class Entry:
    """Registered component.

    Attributes:
        target: the factory, or its "module:attribute", which is imported on first use.
        source: the core, or the plugin, for messages.
        plugin: the plugin that registered it; None for the core's own components.
    """

    kind: str
    name: str
    target: str | Callable[..., Any]
    source: str
    plugin: Plugin | None = None

    def load(self) -> Callable[..., Any]:
        """Import the factory. Exceptions that its module raises are passed on.

        Raises:
            ContractError: the import changes torch's default dtype or seed; both are restored.
        """
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        with same_defaults(str(self)):
            factory: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return factory

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} ({self.source})"


@dataclass(frozen=True)
class PluginFailure:
    """Plugin that could not be loaded, with the cause."""

    source: str
    cause: str

    def __str__(self) -> str:
        return f"Plugin {self.source} could not be loaded ({self.cause})."


@contextmanager
def same_defaults(what: str) -> Iterator[None]:
    """Guard an import of third-party code, which must not change torch's default dtype or seed. Imports no torch.

    Args:
        what: the imported component or plugin, for the message.

    Raises:
        ContractError: the import changed one of them. They are restored in any case, even if the import fails.
    """
    before = _defaults()
    try:
        yield
    finally:
        changed = _restore(before)
    if changed:
        raise ContractError(f"{what} changes {' and '.join(changed)} on import; do that in the code that needs it")


def _defaults() -> dict[str, Any]:
    """Return torch's default dtype, seed and random state; an empty dict if torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {"dtype": torch.get_default_dtype(), "seed": torch.initial_seed(), "state": torch.get_rng_state()}


def _restore(before: Mapping[str, Any]) -> list[str]:
    """Restore the defaults and describe those that changed. Drawing random numbers does not count as a change."""
    after, changed = _defaults(), list[str]()
    if not after:
        return changed
    torch = sys.modules["torch"]
    dtype = before.get("dtype", torch.float32)
    if after["dtype"] != dtype:
        torch.set_default_dtype(dtype)
        changed.append(f"torch's default dtype to {after['dtype']}")
    if after["seed"] != before.get("seed", after["seed"]) or (not before and after["seed"] < MANUAL_SEED):
        changed.append(f"torch's seed to {after['seed']}")
    if before:
        torch.set_rng_state(before["state"])
    elif after["seed"] < MANUAL_SEED:
        torch.seed()
    return changed


@dataclass
class Registry:
    """All components by kind and name.

    Attributes:
        failures: plugins that could not be loaded; shown whenever a lookup fails.
        disabled: plugins listed in `SSMVL_DISABLE_PLUGINS`; shown whenever a lookup fails.
        unknown: messages about names in `SSMVL_DISABLE_PLUGINS` that match no installed plugin.
    """

    core: str = "ssmvl"
    failures: list[PluginFailure] = field(default_factory=list)
    disabled: list[Plugin] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    _entries: dict[tuple[str, str], list[Entry]] = field(default_factory=dict)

    def add(self, entries: Iterable[Entry]) -> None:
        """Add all entries of one plugin, or none if one is invalid.

        Raises:
            ValueError: a kind is unknown, a name is not a non-empty printable string or belongs to the core, or a
                target is neither callable nor "module:attribute".
        """
        entries = list(entries)
        for entry in entries:
            if not isinstance(entry.kind, str) or entry.kind not in INJECTED:
                raise ValueError(f"unknown kind {entry.kind!r} for {entry.name!r}.{nearest(entry.kind, INJECTED)}")
            name: object = entry.name
            if type(name) is not str or not name or not name.isprintable() or name != name.strip():
                raise ValueError(f"the name of a {entry.kind} must be a non-empty printable string, received {name!r}")
            separator = "/" if entry.kind == "recipe" else ":"
            if not callable(entry.target) and separator not in str(entry.target):
                form = "package/path.yaml" if entry.kind == "recipe" else "module:attribute"
                target = f"{entry.kind} {entry.name!r}: the target must have the form {form!r}"
                raise ValueError(f"{target}, received {entry.target!r}")
            first = self._entries.get((entry.kind, entry.name), [entry])[0]
            if first.source == self.core and entry.source != self.core:
                raise ValueError(f"{entry.kind} {entry.name!r} belongs to {self.core}; choose another name")
        for entry in entries:
            self._entries.setdefault((entry.kind, entry.name), []).append(entry)

    def find(self, kind: str, name: str) -> Entry:
        """Look up a component by kind and name.

        Raises:
            UnknownComponentError: no such component. The message lists the nearest name, all names, and broken or
                disabled plugins.
            DuplicateComponentError: two plugins register it.
        """
        entries = self._entries.get((kind, name), [])
        if not entries:
            lines = [f"unknown {kind} {name!r}.{nearest(name, self.names(kind))}", *self.remarks()]
            raise UnknownComponentError("\n".join(lines))
        if len(entries) > 1:
            sources = " and ".join(entry.source for entry in entries)
            raise DuplicateComponentError(
                f"{kind} {name!r} is registered by both {sources}; disable one with SSMVL_DISABLE_PLUGINS=<plugin>"
            )
        return entries[0]

    def remarks(self) -> list[str]:
        """Return one line per broken plugin, disabled plugin and unknown name in `SSMVL_DISABLE_PLUGINS`."""
        disabled = [f"Plugin {plugin} is disabled (SSMVL_DISABLE_PLUGINS)." for plugin in self.disabled]
        return [*map(str, self.failures), *disabled, *self.unknown]

    def names(self, kind: str) -> list[str]:
        """List the names registered for `kind`, sorted."""
        return sorted(name for k, name in self._entries if k == kind)

    def entries(self) -> list[Entry]:
        """List all entries, duplicates included, sorted by kind and name."""
        return [entry for key in sorted(self._entries) for entry in self._entries[key]]

    def conflicts(self) -> list[tuple[Entry, ...]]:
        """List entries that share kind and name, one tuple for each such name."""
        return [tuple(entries) for _, entries in sorted(self._entries.items()) if len(entries) > 1]
