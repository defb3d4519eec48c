"""(kind, name) -> factory: the one table in which components are found, and the marker for nested components."""

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
"""What a plugin's hook receives: `register(kind, name, target)`, target a factory or "module:attribute"."""

# What the library passes to a component of each kind when it is built or called. These names are never options:
# writing one in a recipe is an error. A kind exists because it stands here.
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
    """Marks a parameter that takes a component of `kind`: `mixer: Annotated[Callable[..., Module], Part("mixer")]`.

    In a recipe such a parameter takes a name or `{name: …, options}`; the code receives a callable that awaits the
    kind's injected arguments. `ssmvl.interfaces` has an alias for each kind (`MixerPart`, `ScanOrderPart`, …).
    """

    kind: str


@dataclass(frozen=True)
class Check:
    """Marks a parameter whose values are limited: `Annotated[int, Check("at least 1", lambda n: n >= 1)]`."""

    allowed: str
    holds: Callable[[Any], object]


Count = Annotated[int, Check("from 1 to 10^9", lambda number: 1 <= number <= 10**9)]
Depth = Annotated[int, Check("from 1 to 256", lambda number: 1 <= number <= 256)]
Pixels = Annotated[int, Check("from 1 to 4,096", lambda number: 1 <= number <= 4096)]
Seed = Annotated[int, Check("from 0 to 2^32 - 1", lambda number: 0 <= number < 2**32)]


class Plugin(NamedTuple):
    """An installed plugin: one entry point of a distribution."""

    distribution: str
    version: str
    name: str
    module: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.module})"


@dataclass(frozen=True)
class Entry:
    """One registered component: a factory, or the "module:attribute" where it is found when first used.

    Attributes:
        plugin: the plugin that registered it; None for the core's own components.
    """

    kind: str
    name: str
    target: str | Callable[..., Any]
    source: str
    plugin: Plugin | None = None

    def load(self) -> Callable[..., Any]:
        """Import the factory. Raises whatever its module raises.

        Raises:
            ContractError: importing it changes torch's default dtype or seed, which are restored.
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
    """A plugin that could not be loaded: where it came from and why."""

    source: str
    cause: str

    def __str__(self) -> str:
        return f"Plugin {self.source} could not be loaded ({self.cause})."


@contextmanager
def same_defaults(what: str) -> Iterator[None]:
    """Import foreign code: torch's default dtype and seed belong to the process, not to a plugin. Imports no torch.

    Raises:
        ContractError: the import changed one of them. All are restored, also where the import itself fails.
    """
    before = _defaults()
    try:
        yield
    finally:
        changed = _restored(before)
    if changed:
        raise ContractError(f"{what} changes {' and '.join(changed)} on import; do that in the code that needs it")


def _defaults() -> dict[str, Any]:
    """Torch's default dtype, seed and random state; empty if torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {"dtype": torch.get_default_dtype(), "seed": torch.initial_seed(), "state": torch.get_rng_state()}


def _restored(before: Mapping[str, Any]) -> list[str]:
    """Restore what changed, and name it; random numbers that were merely drawn are not mentioned."""
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
    """All components, found by kind and name.

    Attributes:
        failures: plugins that could not be loaded; shown whenever a lookup fails.
        disabled: plugins that `SSMVL_DISABLE_PLUGINS` names; shown whenever a lookup fails.
        unknown: names in `SSMVL_DISABLE_PLUGINS` that no installed plugin has.
    """

    core: str = "ssmvl"
    failures: list[PluginFailure] = field(default_factory=list)
    disabled: list[Plugin] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    _entries: dict[tuple[str, str], list[Entry]] = field(default_factory=dict)

    def add(self, entries: Iterable[Entry]) -> None:
        """Add the entries of one plugin: all of them, or none.

        Raises:
            ValueError: an unknown kind, a name that is not a non-empty printable string, a target that is neither
                callable nor "module:attribute", or a name that belongs to the core.
        """
        entries = list(entries)
        for entry in entries:
            if not isinstance(entry.kind, str) or entry.kind not in INJECTED:
                raise ValueError(f"no kind {entry.kind!r} for {entry.name!r}.{nearest(entry.kind, INJECTED)}")
            name: object = entry.name
            if type(name) is not str or not name or not name.isprintable() or name != name.strip():
                raise ValueError(f"the name of a {entry.kind} must be a non-empty printable string, received {name!r}")
            separator = "/" if entry.kind == "recipe" else ":"
            if not callable(entry.target) and separator not in str(entry.target):
                form = "package/path.yaml" if entry.kind == "recipe" else "module:attribute"
                raise ValueError(f"{entry.kind} {entry.name!r}: write {form!r}, not {entry.target!r}")
            first = self._entries.get((entry.kind, entry.name), [entry])[0]
            if first.source == self.core and entry.source != self.core:
                raise ValueError(f"{entry.kind} {entry.name!r} belongs to {self.core}; choose another name")
        for entry in entries:
            self._entries.setdefault((entry.kind, entry.name), []).append(entry)

    def find(self, kind: str, name: str) -> Entry:
        """The entry of that kind and name.

        Raises:
            UnknownComponentError: there is none; names the nearest, all others, and the plugins that failed.
            DuplicateComponentError: two plugins offer it.
        """
        found = self._entries.get((kind, name), [])
        if not found:
            lines = [f"no {kind} named {name!r}.{nearest(name, self.names(kind))}", *self.remarks()]
            raise UnknownComponentError("\n".join(lines))
        if len(found) > 1:
            sources = " and ".join(entry.source for entry in found)
            raise DuplicateComponentError(
                f"{kind} {name!r} is offered by both {sources}; disable one with SSMVL_DISABLE_PLUGINS=<plugin>"
            )
        return found[0]

    def remarks(self) -> list[str]:
        """One line for each plugin that is broken or disabled, and for each unknown name of a disabled one."""
        disabled = [f"Plugin {plugin} is disabled (SSMVL_DISABLE_PLUGINS)." for plugin in self.disabled]
        return [*map(str, self.failures), *disabled, *self.unknown]

    def names(self, kind: str) -> list[str]:
        """Names registered for `kind`, sorted."""
        return sorted(name for k, name in self._entries if k == kind)

    def entries(self) -> list[Entry]:
        """Every entry, duplicates included, sorted by kind and name."""
        return [entry for key in sorted(self._entries) for entry in self._entries[key]]

    def conflicts(self) -> list[tuple[Entry, ...]]:
        """Entries that share kind and name, one tuple for each such name."""
        return [tuple(found) for _, found in sorted(self._entries.items()) if len(found) > 1]
