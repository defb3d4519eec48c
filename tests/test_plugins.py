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


def found_with_warning() -> Registry:
    with pytest.warns(PluginWarning):
        return components()


def test_an_installed_plugin_brings_its_components(install_plugin: Install) -> None:
    install_plugin("zz-good", plugin("register('mixer', 'lazy_mixer', 'zz_never_imported:Mixer')"))
    entry = components().find("mixer", "lazy_mixer")
    assert entry.source == "zz-good 1.0 (zz_good)"
    assert components().failures == []


def test_a_plugin_that_cannot_be_imported_is_kept_with_its_cause_and_breaks_nothing_else(
    install_plugin: Install,
) -> None:
    install_plugin("aa-broken", "raise OSError('libnothing.so is missing')")
    install_plugin("zz-good", GOOD)
    with pytest.warns(PluginWarning, match=r"aa-broken 1\.0 .*libnothing\.so is missing") as caught:
        registry = components()
    components()
    assert len(caught) == 1
    (failure,) = registry.failures
    assert failure.source == "aa-broken 1.0 (aa_broken)"
    assert failure.cause.startswith("OSError: libnothing.so is missing (")
    assert failure.cause.endswith("aa_broken.py, line 1)")
    assert registry.find("mixer", "good_mixer").source == "zz-good 1.0 (zz_good)"
    assert {(e.kind, e.name) for e in registry.entries() if e.source == "ssmvl"} == set(COMPONENTS)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import sys; sys.exit('licence expired')", "SystemExit: licence expired"),
        ("def ssmvl_register(register): pass", "it has no function ssmvl_register marked with @ssmvl.hookimpl"),
        ("import ssmvl\n@ssmvl.hookimpl\ndef ssmvl_registr(register): pass", "ssmvl_registr"),
        ("import ssmvl\n@ssmvl.hookimpl\ndef ssmvl_register(registry): pass", "registry"),
        (plugin("register('mixr', 'x', dict)"), "no kind 'mixr' for 'x'. Did you mean 'mixer'?"),
        (plugin("register('mixer', 'x', 'no_colon')"), "write 'module:attribute', not 'no_colon'"),
        (plugin("register('mixer', 'x')"), "TypeError"),
        (plugin("register('mixer', 'mamba2', dict)"), "mixer 'mamba2' belongs to ssmvl"),
        (plugin("register('mixer', 'half', dict)", "raise RuntimeError('midway')"), "RuntimeError: midway"),
        (plugin("register('mixer', 'half', dict)", "register('nothing', 'x', dict)"), "no kind 'nothing'"),
        (plugin("register('mixer', 'half', dict)", "register('mixer', 'mamba2', dict)"), "belongs to ssmvl"),
    ],
)
def test_a_wrong_plugin_fails_alone_and_leaves_nothing_behind(install_plugin: Install, code: str, cause: str) -> None:
    install_plugin("mm-wrong", code)
    install_plugin("zz-good", GOOD)
    registry = found_with_warning()
    (failure,) = registry.failures
    assert failure.source == "mm-wrong 1.0 (mm_wrong)"
    assert cause in failure.cause
    assert not [entry for entry in registry.entries() if "mm-wrong" in entry.source]
    assert registry.find("mixer", "good_mixer")
    assert registry.find("mixer", "mamba2").source == "ssmvl"


def test_two_wrong_plugins_are_both_kept(install_plugin: Install) -> None:
    install_plugin("mm-first", "1 / 0")
    install_plugin("mm-second", "import ssmvl\n@ssmvl.hookimpl\ndef ssmvl_registr(register): pass")
    assert [failure.source.split()[0] for failure in found_with_warning().failures] == ["mm-first", "mm-second"]


def test_a_failed_lookup_shows_what_could_not_be_loaded(install_plugin: Install) -> None:
    install_plugin("mm-wrong", "raise RuntimeError('so it went')")
    registry = found_with_warning()
    with pytest.raises(UnknownComponentError, match=r"mm-wrong 1\.0 .*RuntimeError: so it went"):
        registry.find("mixer", "theirs")


def test_a_failed_lookup_of_a_recipe_shows_what_could_not_be_loaded(install_plugin: Install) -> None:
    install_plugin("mm-wrong", "raise RuntimeError('so it went')")
    found_with_warning()
    with pytest.raises(RecipeError, match=r"mm-wrong 1\.0 .*RuntimeError: so it went"):
        load_recipe("their_recipe")


def test_a_name_of_two_plugins_fails_when_it_is_looked_up(install_plugin: Install) -> None:
    install_plugin("zz-second", plugin("register('mixer', 'shared', dict)", "register('mixer', 'own', dict)"))
    install_plugin("aa-first", plugin("register('mixer', 'shared', dict)"))
    registry = components()
    assert registry.failures == []
    with pytest.raises(DuplicateComponentError, match=r"aa-first 1\.0 \(aa_first\) and zz-second 1\.0 \(zz_second\)"):
        registry.find("mixer", "shared")
    assert registry.find("mixer", "own")
    assert registry.find("mixer", "mamba2")
    assert len(registry.conflicts()) == 1


def test_disabling_one_of_two_ends_their_conflict(install_plugin: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin("aa-first", plugin("register('mixer', 'shared', dict)"))
    install_plugin("zz-second", plugin("register('mixer', 'shared', dict)"))
    monkeypatch.setenv("SSMVL_DISABLE_PLUGINS", "aa-first")
    assert components().find("mixer", "shared").source == "zz-second 1.0 (zz_second)"


def test_disabled_plugins_are_not_even_imported(install_plugin: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin("mm-first", "raise RuntimeError('imported')")
    install_plugin("mm-second", "raise RuntimeError('imported')")
    install_plugin("zz-good", GOOD)
    monkeypatch.setenv("SSMVL_DISABLE_PLUGINS", "mm-second, mm-first")
    registry = components()
    assert registry.failures == []
    assert not {"mm_first", "mm_second"} & sys.modules.keys()
    assert registry.find("mixer", "good_mixer")


def test_an_entry_point_is_disabled_by_its_distribution_too(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with warnings.catch_warnings():  # the standard library finds it and it fails; the backport, if imported, skips it
        warnings.simplefilter("ignore", PluginWarning)
        assert components().find("mixer", "good_mixer")
    assert components().find("connector", "msc_advanced")


def test_an_entry_point_that_is_no_module_path_is_a_failure(install_plugin: Install, tmp_path: Path) -> None:
    install_plugin("mm-odd", GOOD)
    (tmp_path / "mm_odd-1.0.dist-info" / "entry_points.txt").write_text("[ssmvl]\nmm-odd = not a module!\n")
    install_plugin("zz-fine", plugin("register('mixer', 'fine_mixer', dict)"))
    registry = found_with_warning()
    assert registry.failures[0].source.startswith("mm-odd 1.0")
    assert registry.find("mixer", "fine_mixer")


def test_a_mistake_of_the_core_itself_is_not_hidden() -> None:
    class BrokenCore:
        @hookimpl
        def ssmvl_register(self, register: Callable[..., None]) -> None:
            register("nothing", "x", dict)

    with pytest.raises(ValueError, match="no kind 'nothing'"):
        discover(BrokenCore())
