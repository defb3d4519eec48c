from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from ssmvl.errors import DuplicateComponentError, PluginWarning, RecipeError, UnknownComponentError
from ssmvl.plugins import COMPONENTS, components, discover, hookimpl
from ssmvl.recipes.merge import load_recipe
from ssmvl.registry import Registry

Install = Callable[[str, str], None]


def plugin(*lines: str, head: str = "") -> str:
    body = "\n    ".join(lines)
    return f"{head}\nimport ssmvl\n\n@ssmvl.hookimpl\ndef ssmvl_register(register):\n    {body}\n"


GOOD = plugin("register('mixer', 'good_mixer', dict)")


def components_with_warning() -> Registry:
    with pytest.warns(PluginWarning):
        return components()


def test_an_installed_plugin_adds_its_components(install_plugin: Install) -> None:
    install_plugin("zz-good", plugin("register('mixer', 'lazy_mixer', 'zz_never_imported:Mixer')"))
    entry = components().find("mixer", "lazy_mixer")
    assert entry.source == "zz-good 1.0 (zz_good)"
    assert components().failures == []


def test_a_failed_import_is_recorded_with_its_cause_and_breaks_nothing_else(
    install_plugin: Install,
) -> None:
    install_plugin("aa-broken", "raise OSError('libnothing.so is missing')")
    install_plugin("zz-good", GOOD)
    with pytest.warns(PluginWarning, match=r"aa-broken 1\.0 .*libnothing\.so is missing") as warned:
        registry = components()
    components()
    assert len(warned) == 1
    (failure,) = registry.failures
    assert failure.source == "aa-broken 1.0 (aa_broken)"
    assert failure.cause.startswith("OSError: libnothing.so is missing (")
    assert failure.cause.endswith("aa_broken.py, line 1)")
    assert registry.find("mixer", "good_mixer").source == "zz-good 1.0 (zz_good)"
    assert {(e.kind, e.name) for e in registry.entries() if e.source == "ssmvl"} == set(COMPONENTS)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import sys; sys.exit('license expired')", "SystemExit: license expired"),
        ("def ssmvl_register(register): pass", "the module has no function ssmvl_register marked with @ssmvl.hookimpl"),
        ("import ssmvl\n@ssmvl.hookimpl\ndef ssmvl_registr(register): pass", "ssmvl_registr"),
        ("import ssmvl\n@ssmvl.hookimpl\ndef ssmvl_register(registry): pass", "registry"),
        (plugin("register('mixr', 'x', dict)"), "unknown kind 'mixr' for 'x'. Did you mean 'mixer'?"),
        (
            plugin("register('mixer', 'x', 'no_colon')"),
            "the target must have the form 'module:attribute', received 'no_colon'",
        ),
        (plugin("register('mixer', 'x')"), "TypeError"),
        (plugin("register('mixer', 'mamba2', dict)"), "mixer 'mamba2' belongs to ssmvl"),
        (plugin("register('mixer', 'half', dict)", "raise RuntimeError('midway')"), "RuntimeError: midway"),
        (plugin("register('mixer', 'half', dict)", "register('nothing', 'x', dict)"), "unknown kind 'nothing'"),
        (plugin("register('mixer', 'half', dict)", "register('mixer', 'mamba2', dict)"), "belongs to ssmvl"),
    ],
)
def test_an_invalid_plugin_fails_alone_and_registers_nothing(install_plugin: Install, code: str, cause: str) -> None:
    install_plugin("mm-wrong", code)
    install_plugin("zz-good", GOOD)
    registry = components_with_warning()
    (failure,) = registry.failures
    assert failure.source == "mm-wrong 1.0 (mm_wrong)"
    assert cause in failure.cause
    assert not [entry for entry in registry.entries() if "mm-wrong" in entry.source]
    assert registry.find("mixer", "good_mixer")
    assert registry.find("mixer", "mamba2").source == "ssmvl"


def test_two_failures_are_both_recorded(install_plugin: Install) -> None:
    install_plugin("mm-first", "1 / 0")
    install_plugin("mm-second", "import ssmvl\n@ssmvl.hookimpl\ndef ssmvl_registr(register): pass")
    assert [failure.source.split()[0] for failure in components_with_warning().failures] == ["mm-first", "mm-second"]


def test_a_failed_lookup_shows_broken_plugins(install_plugin: Install) -> None:
    install_plugin("mm-wrong", "raise RuntimeError('no luck')")
    registry = components_with_warning()
    with pytest.raises(UnknownComponentError, match=r"mm-wrong 1\.0 .*RuntimeError: no luck"):
        registry.find("mixer", "missing_mixer")


def test_a_failed_lookup_of_a_recipe_shows_broken_plugins(install_plugin: Install) -> None:
    install_plugin("mm-wrong", "raise RuntimeError('no luck')")
    components_with_warning()
    with pytest.raises(RecipeError, match=r"mm-wrong 1\.0 .*RuntimeError: no luck"):
        load_recipe("missing_recipe")


def test_a_name_registered_by_two_plugins_fails_on_lookup(install_plugin: Install) -> None:
    install_plugin("zz-second", plugin("register('mixer', 'shared', dict)", "register('mixer', 'own', dict)"))
    install_plugin("aa-first", plugin("register('mixer', 'shared', dict)"))
    registry = components()
    assert registry.failures == []
    with pytest.raises(DuplicateComponentError, match=r"aa-first 1\.0 \(aa_first\) and zz-second 1\.0 \(zz_second\)"):
        registry.find("mixer", "shared")
    assert registry.find("mixer", "own")
    assert registry.find("mixer", "mamba2")
    assert len(registry.conflicts()) == 1


def test_disabling_one_of_two_plugins_resolves_their_conflict(
    install_plugin: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("aa-first", plugin("register('mixer', 'shared', dict)"))
    install_plugin("zz-second", plugin("register('mixer', 'shared', dict)"))
    monkeypatch.setenv("SSMVL_DISABLE_PLUGINS", "aa-first")
    assert components().find("mixer", "shared").source == "zz-second 1.0 (zz_second)"


def test_disabled_plugins_are_not_imported(install_plugin: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin("mm-first", "raise RuntimeError('imported')")
    install_plugin("mm-second", "raise RuntimeError('imported')")
    install_plugin("zz-good", GOOD)
    monkeypatch.setenv("SSMVL_DISABLE_PLUGINS", "mm-second, mm-first")
    registry = components()
    assert registry.failures == []
    assert not {"mm_first", "mm_second"} & sys.modules.keys()
    assert registry.find("mixer", "good_mixer")


def test_the_name_of_a_distribution_disables_its_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMVL_DISABLE_PLUGINS", "ssmvl")  # the distribution of the entry point ml_mamba
    components.cache_clear()
    try:
        assert "msc_advanced" not in components().names("connector")
        assert "mlp" in components().names("connector")
    finally:
        components.cache_clear()


def test_a_distribution_without_metadata_breaks_nothing(install_plugin: Install, tmp_path: Path) -> None:
    half = tmp_path / "half_uninstalled-1.0.dist-info"
    half.mkdir()
    (half / "entry_points.txt").write_text("[ssmvl]\nhalf = half_uninstalled\n")
    install_plugin("zz-good", GOOD)
    importlib.invalidate_caches()
    with warnings.catch_warnings():  # a failure with importlib.metadata; the backport, if imported, skips it
        warnings.simplefilter("ignore", PluginWarning)
        assert components().find("mixer", "good_mixer")
    assert components().find("connector", "msc_advanced")


def test_an_entry_point_without_a_module_path_is_a_failure(install_plugin: Install, tmp_path: Path) -> None:
    install_plugin("mm-odd", GOOD)
    (tmp_path / "mm_odd-1.0.dist-info" / "entry_points.txt").write_text("[ssmvl]\nmm-odd = not a module!\n")
    install_plugin("zz-fine", plugin("register('mixer', 'fine_mixer', dict)"))
    registry = components_with_warning()
    assert registry.failures[0].source.startswith("mm-odd 1.0")
    assert registry.find("mixer", "fine_mixer")


def test_errors_of_the_core_are_raised() -> None:
    class BrokenCore:
        @hookimpl
        def ssmvl_register(self, register: Callable[..., None]) -> None:
            register("nothing", "x", dict)

    with pytest.raises(ValueError, match="unknown kind 'nothing'"):
        discover(BrokenCore())
