from __future__ import annotations

from typing import Any, cast

import pytest

from ssmvl.errors import DuplicateComponentError, UnknownComponentError
from ssmvl.plugins import COMPONENTS, components
from ssmvl.registry import INJECTED, Entry, PluginFailure, Registry

TARGET = "mixer 'x': the target must have the form 'module:attribute'"


def registry_of(*entries: tuple[str, str, str]) -> Registry:
    registry = Registry()
    for kind, name, source in entries:
        registry.add([Entry(kind, name, dict, source)])
    return registry


def test_a_component_is_found_by_kind_and_name() -> None:
    registry = registry_of(("mixer", "x", "a"), ("encoder", "x", "b"))
    assert registry.find("mixer", "x").source == "a"
    assert registry.find("encoder", "x").source == "b"


def test_an_unknown_name_raises_an_error_with_suggestions_and_failures() -> None:
    registry = registry_of(("mixer", "mamba2", "a"), ("mixer", "rwkv", "a"), ("encoder", "mamba", "a"))
    registry.failures.append(PluginFailure("broken 1.0 (broken)", "ImportError: no luck"))
    with pytest.raises(UnknownComponentError) as caught:
        registry.find("mixer", "mamba")
    assert "unknown mixer 'mamba'. Did you mean 'mamba2'? Allowed: mamba2, rwkv." in str(caught.value)
    assert "Plugin broken 1.0 (broken) could not be loaded (ImportError: no luck)." in str(caught.value)


def test_a_duplicate_name_fails_on_lookup_and_names_both_sources() -> None:
    registry = registry_of(("mixer", "x", "first 1.0"), ("mixer", "x", "second 2.0"), ("mixer", "y", "second 2.0"))
    with pytest.raises(DuplicateComponentError, match=r"mixer 'x' is registered by both first 1\.0 and second 2\.0"):
        registry.find("mixer", "x")
    assert registry.find("mixer", "y").source == "second 2.0"
    assert [[entry.source for entry in entries] for entries in registry.conflicts()] == [["first 1.0", "second 2.0"]]


def test_entries_and_names_are_sorted() -> None:
    registry = registry_of(("mixer", "b", "s"), ("encoder", "c", "s"), ("mixer", "a", "s"))
    assert [(entry.kind, entry.name) for entry in registry.entries()] == [
        ("encoder", "c"),
        ("mixer", "a"),
        ("mixer", "b"),
    ]
    assert registry.names("mixer") == ["a", "b"]
    assert registry.names("fusion") == []


@pytest.mark.parametrize("name", [5, None, "", " ", "two\nlines", b"x", ("x",)])
def test_an_invalid_name_rejects_all_entries(name: object) -> None:
    registry = registry_of(("mixer", "x", "a"))
    with pytest.raises(ValueError, match="the name of a mixer must be a non-empty printable string"):
        registry.add([Entry("mixer", "y", dict, "b"), Entry("mixer", cast(Any, name), dict, "b")])
    assert registry.names("mixer") == ["x"]


def test_the_core_keeps_its_names() -> None:
    registry = registry_of(("mixer", "x", "ssmvl"))
    with pytest.raises(ValueError, match="mixer 'x' belongs to ssmvl; choose another name"):
        registry.add([Entry("mixer", "x", dict, "other")])
    assert registry.find("mixer", "x").source == "ssmvl"


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("mixr", dict, "unknown kind 'mixr' for 'x'. Did you mean 'mixer'"),
        ("mixer", "module.attribute", f"{TARGET}, received 'module.attribute'"),
        ("mixer", 5, f"{TARGET}, received 5"),
        ("mixer", None, f"{TARGET}, received None"),
    ],
)
def test_an_invalid_entry_rejects_all_entries_of_its_plugin(kind: str, target: Any, message: str) -> None:
    registry = Registry()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        registry.add([Entry("mixer", "good", dict, "s"), Entry(kind, "x", target, "s")])
    assert message in str(caught.value)
    assert registry.entries() == []


def test_a_recipe_is_registered_as_a_path() -> None:
    registry = Registry()
    registry.add([Entry("recipe", "x", "package/recipes/x.yaml", "s")])
    assert registry.names("recipe") == ["x"]


def test_a_target_is_a_factory_or_its_path() -> None:
    assert Entry("mixer", "x", dict, "s").load() is dict
    assert Entry("mixer", "x", "collections:OrderedDict", "s").load().__name__ == "OrderedDict"


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_every_component_of_the_core_exists(kind: str, name: str) -> None:
    entry = components().find(kind, name)
    assert entry.source == "ssmvl"
    assert callable(entry.load())
    assert kind in INJECTED
