"""Table of all components: those of the core and of installed plugins, which are loaded one by one.

A component's module is imported on first use.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from importlib.metadata import Distribution, distributions

import pluggy

from ssmvl.errors import PluginWarning, foreign, nearest
from ssmvl.registry import Entry, Plugin, PluginFailure, Register, Registry, same_defaults

GROUP = "ssmvl"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)
"""Marks the function `ssmvl_register` of a plugin."""

COMPONENTS = {
    ("scan_order", "raster"): "ssmvl.scans:raster",
    ("scan_order", "bsm"): "ssmvl.scans:bsm",
    ("scan_order", "csm"): "ssmvl.scans:csm",
    ("mixer", "mamba1"): "ssmvl.layers.mamba1:Mamba1Mixer",
    ("mixer", "mamba2"): "ssmvl.layers.mamba2:Mamba2Mixer",
    ("encoder", "timm"): "ssmvl.vision.encoders:timm_encoder",
    ("encoder", "digit_vit"): "ssmvl.vision.digit_vit:digit_vit",
    ("fusion", "channel"): "ssmvl.vision.fusion:ChannelFusion",
    ("fusion", "sequence"): "ssmvl.vision.fusion:SequenceFusion",
    ("connector", "mlp"): "ssmvl.connectors.projectors:MlpConnector",
    ("language_model", "mamba1_lm"): "ssmvl.language.mamba_lm:Mamba1LM",
    ("language_model", "mamba2_lm"): "ssmvl.language.mamba_lm:MambaLM",
    ("checkpoint", "ssmvl"): "ssmvl.checkpoints.layouts:ssmvl_model",
    ("checkpoint", "state_spaces"): "ssmvl.language.mamba_layouts:state_spaces",
    ("checkpoint", "transformers_mamba"): "ssmvl.language.mamba_layouts:transformers_mamba",
    ("prompt", "mamba"): "ssmvl.processing.prompts:MambaPrompt",
    ("prompt", "plain"): "ssmvl.processing.prompts:PlainPrompt",
    ("prompt", "vicuna"): "ssmvl.processing.prompts:VicunaPrompt",
    ("dataset", "digit_scenes"): "ssmvl.data.scenes.scenes:digit_scenes",
    ("dataset", "shards"): "ssmvl.data.shards:existing_shards",
    ("dataset", "mix"): "ssmvl.data.mix:mix",
}


class Hooks:
    """Hooks that a plugin implements."""

    @hookspec
    def ssmvl_register(self, register: Register) -> None:
        """Call `register(kind, name, target)` for each component; `target` is a factory or "module:attribute"."""


class CorePlugin:
    """Core components, registered through the same hook as those of plugins."""

    @hookimpl
    def ssmvl_register(self, register: Register) -> None:
        """Register the components of the core."""
        for (kind, name), target in COMPONENTS.items():
            register(kind, name, target)


@functools.cache
def components() -> Registry:
    """Return the registry of all components of the core and of installed plugins. Cached per process."""
    return discover(CorePlugin())


def discover(core: object) -> Registry:
    """Load `core`, then every installed plugin, sorted by distribution and name.

    A plugin that fails gives one warning and an entry in `Registry.failures`; everything else still works.
    `SSMVL_DISABLE_PLUGINS=a,b` lists entry points or distributions that are not imported at all. A name in it that
    matches no installed plugin gives a warning.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Hooks)
    registry = Registry()
    _register(manager, registry, core, registry.core)
    listed = [name.strip() for name in os.environ.get("SSMVL_DISABLE_PLUGINS", "").split(",") if name.strip()]
    disabled = {_canonical(name) for name in listed}
    known: set[str] = set()
    for name, version, distribution in sorted(_installed(), key=lambda installed: installed[:2]):
        known.add(name)
        try:
            points = sorted(distribution.entry_points.select(group=GROUP), key=lambda point: point.name)
        except Exception as error:  # a single malformed line makes all entry points of the distribution unreadable
            if _canonical(name) not in disabled:
                _record_failure(registry, f"{name} {version}", error)
            continue
        for point in points:
            plugin = Plugin(name, version, point.name, point.value)
            names = (name, point.name, point.value.partition(":")[0])
            known |= {*names}
            if disabled & {*map(_canonical, names)}:
                registry.disabled.append(plugin)
                continue
            try:
                with same_defaults(str(plugin)):
                    module = point.load()
                _register(manager, registry, module, str(plugin), plugin)
            # Third-party code may raise anything, SystemExit included, and must not break other plugins.
            except (Exception, SystemExit) as error:
                _record_failure(registry, str(plugin), error)
    for name in (name for name in listed if _canonical(name) not in map(_canonical, known)):
        registry.unknown.append(f"SSMVL_DISABLE_PLUGINS: unknown plugin {name!r}.{nearest(name, known)}")
        warnings.warn(registry.unknown[-1], PluginWarning, stacklevel=3)
    return registry


def _canonical(name: str) -> str:
    """Normalize a distribution's name as package indices do: `My_Plugin` -> `my-plugin`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed() -> list[tuple[str, str, Distribution]]:
    """Find distributions with `ssmvl` entry points, which are not parsed yet: (name, version, distribution)."""
    installed: dict[str, tuple[str, str, Distribution]] = {}
    for distribution in distributions():
        if f"[{GROUP}]" in (distribution.read_text("entry_points.txt") or ""):
            metadata = distribution.metadata  # None, or without a name, if the distribution is partly removed
            name, version = (metadata["Name"] or "?", metadata["Version"] or "?") if metadata else ("?", "?")
            installed.setdefault(name, (name, version, distribution))  # the first on sys.path wins, as in imports
    return list(installed.values())


def _record_failure(registry: Registry, source: str, error: BaseException) -> None:
    failure = PluginFailure(source, foreign(error))
    registry.failures.append(failure)
    warnings.warn(str(failure), PluginWarning, stacklevel=4)


def _register(
    manager: pluggy.PluginManager, registry: Registry, module: object, source: str, plugin: Plugin | None = None
) -> None:
    entries: list[Entry] = []
    manager.register(module, name=source)
    try:
        manager.check_pending()  # rejects misspelled hook names, which pluggy otherwise accepts silently
        others = [p for p in manager.get_plugins() if p is not module]
        hook = manager.subset_hook_caller("ssmvl_register", remove_plugins=others)
        if not hook.get_hookimpls():
            raise ValueError("the module has no function ssmvl_register marked with @ssmvl.hookimpl")
        hook(register=lambda kind, name, target: entries.append(Entry(kind, name, target, source, plugin)))
        if not entries:
            raise ValueError("the module's function ssmvl_register registers nothing")
        registry.add(entries)
    except BaseException:
        manager.unregister(module)
        raise
