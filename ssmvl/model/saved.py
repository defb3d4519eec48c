"""Saved models: directories with weights, recipe, tokenizer, format version and model card, written atomically."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ssmvl import __version__
from ssmvl.checkpoints.files import BYTES, DIGESTS_FILE, write_folder
from ssmvl.checkpoints.hub import local
from ssmvl.checkpoints.layouts import NATIVE_LAYOUT
from ssmvl.errors import CheckpointError, short
from ssmvl.files import ABOUT_FILE
from ssmvl.interfaces import Prompt
from ssmvl.model.blueprint import Blueprint
from ssmvl.model.build import require_same_settings
from ssmvl.plugins import components
from ssmvl.processing.processor import Processor
from ssmvl.processing.tokenizers import CONFIG_FILE, TOKENIZER_FILE, config_text
from ssmvl.recipes.binding import components_in
from ssmvl.recipes.merge import Recipe
from ssmvl.registry import Plugin

FORMAT_VERSION = 2  # 1: texts lacked the tokens that the tokenizer's post-processor prepends
CARD_FILE = "README.md"
OURS = "<!-- Written by ssmvl. Saving again writes it anew, unless this line is deleted. -->"
CARD = """---
library_name: ssmvl
pipeline_tag: image-text-to-text
tags: [state-space-model, mamba]
---
# {run}

{ours}

A vision-language model out of the blocks of ssmvl: encoders {encoders}; fusion {fusion}; connector {connector};
language model {language}; prompt {prompt}. `recipe.yaml` says how it is built and how it was trained.

```python
import ssmvl

assistant = ssmvl.load("path or id of this directory")
print(assistant.generate(["What is in the image?"], ["image.png"]))
```
"""


def save_folder(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    recipe: Recipe | Blueprint,
    processor: Processor,
    model: nn.Module | None = None,
) -> None:
    """Write a saved model, which `saved_folder` finds. An older one stays until the new one is complete.

    A model card in the directory without our marker is kept.

    Raises:
        CheckpointError: see `write_files` and `require_loadable`.
    """
    blueprint = Blueprint.of(recipe)
    own = require_loadable(str(folder), tensors, blueprint, processor, model)
    card = Path(folder).expanduser() / CARD_FILE
    about = {
        "format_version": FORMAT_VERSION,
        "ssmvl": __version__,
        "torch": torch.__version__,
        "plugins": plugins_of(blueprint),
    }
    generated = _card(blueprint.recipe)
    texts = {
        "recipe.yaml": blueprint.recipe.to_yaml(),
        CARD_FILE: card.read_bytes().decode(errors=BYTES) if card.is_file() and not is_ours(card) else generated,
        ABOUT_FILE: json.dumps(about, indent=2) + "\n",
    }
    write_files(folder, own, texts | tokenizer_files(processor))


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict without the name prefixes of torch.compile, DDP and DataParallel around its parts."""
    wrappers = [
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
    ]
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for outer in sorted(wrappers, key=len, reverse=True):
            if name.startswith(f"{outer}module."):
                name = outer + name.removeprefix(f"{outer}module.")
        tensors[name.replace("_orig_mod.", "")] = tensor
    return tensors


def require_loadable(
    folder: str,
    tensors: Mapping[str, Tensor],
    blueprint: Blueprint,
    processor: Processor,
    model: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Check that a model can be loaded with its recipe: names, shapes, finite values, tokenizer and prompt.

    Args:
        folder: for messages.
        tensors: the model's, by name.
        blueprint: of the recipe that is saved with them.
        processor: saved with them.
        model: if given, its settings are also compared with the recipe's.

    Returns:
        The tensors to write. Tied ones appear once, under their first name. Others that share memory are copied.

    Raises:
        CheckpointError: the model could not be loaded; states the reason.
    """
    what = f"{folder} was not written"
    others = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if others:
        raise CheckpointError(
            f"{what}: {short(', '.join(others[:5]))} are not tensors; quantized models cannot be saved"
        )
    described = blueprint.model
    try:
        NATIVE_LAYOUT.check(described, tensors, f"{what}: the state dict to save")
        if model is not None:
            require_same_settings(model, described)
    except CheckpointError as error:
        advice = "merge adapters (merge_and_unload), and remove parametrizations, weight_norm and pruning first"
        message = str(error) if str(error).startswith(what) else f"{what}: {error}"
        raise CheckpointError(f"{message}\n{advice}; a different model needs its own recipe") from error
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CheckpointError(f"{what}: a model on meta has no weights")
    not_finite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if not_finite:
        raise CheckpointError(
            f"{what}: {len(not_finite)} of {len(tensors)} tensors are not finite: {short(', '.join(not_finite[:5]))}"
        )
    ids, allowed = processor.tokenizer.get_vocab_size(), described.language.num_tokens
    if ids != allowed:
        raise CheckpointError(f"{what}: the tokenizer has {ids} ids, but the language model has {allowed}")
    prompt, given = cast(Prompt, blueprint.parts.prompt()), processor.prompt
    if type(prompt) is not type(given) or vars(prompt) != vars(given):
        names = f"{type(processor.prompt).__name__}, but the recipe's is {type(prompt).__name__}"
        raise CheckpointError(f"{what}: the processor's prompt is {names}; set model.prompt in the recipe")
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in NATIVE_LAYOUT.sources(described):
        address = tensors[name].untyped_storage().data_ptr()
        own[name] = tensors[name].clone() if address in seen else tensors[name]
        seen.add(address)
    return own


def write_files(folder: str | Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write a directory given by a user's path, see `write_folder`.

    Raises:
        CheckpointError: the directory holds other files, which would be lost; a file is in its way; or it cannot be
            written.
    """
    try:
        write_folder(Path(folder).expanduser(), tensors, texts)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise CheckpointError(f"the directory {folder} cannot be written ({error})") from error


def is_ours(card: str | Path) -> bool:
    """Return True if a model card has our marker, which allows replacing it."""
    return OURS.encode() in Path(card).read_bytes()


def tokenizer_files(processor: Processor) -> dict[str, str]:
    """Return the processor's tokenizer as two files, by name, that ssmvl and transformers read."""
    return {TOKENIZER_FILE: processor.tokenizer.to_str(pretty=True), CONFIG_FILE: config_text(processor.end)}


def saved_folder(name: str | Path) -> tuple[Path, int]:
    """Find the directory of a saved model, and its format version.

    Args:
        name: the directory, its parent if it is named `model`, such as a run folder, or a Hub id, which is downloaded.

    Raises:
        CheckpointError: there is no saved model, or it has a newer format.
    """
    folder = local(name, "*.safetensors", "*.json", "*.yaml", DIGESTS_FILE)
    try:
        folder = folder / "model" if (folder / "model" / ABOUT_FILE).is_file() else folder
        about = json.loads((folder / ABOUT_FILE).read_text())
        version, plugins = int(about["format_version"]), [Plugin(**plugin) for plugin in about.get("plugins", [])]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{folder} holds no saved model: {ABOUT_FILE} cannot be read ({type(error).__name__}: {error}). "
            "Other weights need a recipe: ssmvl.load(WEIGHTS, recipe=NAME)"
        ) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, but this ssmvl reads up to {FORMAT_VERSION}; update ssmvl"
        )
    _require_plugins(folder, plugins)
    return folder, version


def plugins_of(blueprint: Blueprint) -> list[dict[str, str]]:
    """Return the plugins that a model's components come from, as plain data."""
    plugins = {bound.entry.plugin for bound in components_in(blueprint.parts) if bound.entry and bound.entry.plugin}
    return [plugin._asdict() for plugin in sorted(plugins)]


def _require_plugins(folder: Path, plugins: Iterable[Plugin]) -> None:
    """Check that the plugins that a model was saved with are installed, in any version."""
    registry = components()
    available = {(entry.plugin.distribution, entry.plugin.name) for entry in registry.entries() if entry.plugin}
    for plugin in plugins:
        if (plugin.distribution, plugin.name) in available:
            continue
        why = f"is not installed; pip install {plugin.distribution}=={plugin.version}"
        if any((other.distribution, other.name) == (plugin.distribution, plugin.name) for other in registry.disabled):
            why = "is disabled by SSMVL_DISABLE_PLUGINS"
        broken = [failure for failure in registry.failures if failure.source.startswith(f"{plugin.distribution} ")]
        if broken:
            why = f"could not be loaded ({broken[0].cause})"
        raise CheckpointError(
            f"{folder} needs the plugin {plugin.name!r} of {plugin.distribution} {plugin.version}, which {why}"
        )


def _card(recipe: Recipe) -> str:
    model = recipe.data["model"]
    encoders = " and ".join(f"{name} ({node['name']})" for name, node in model["encoders"].items())
    parts = {kind: model[kind]["name"] for kind in ("fusion", "connector", "language", "prompt")}
    return CARD.format(ours=OURS, run=recipe.data["run"], encoders=encoders, **parts)
