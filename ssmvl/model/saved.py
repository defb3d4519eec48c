"""The folder a model is saved in: weights, recipe, tokenizer, format version and model card; whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
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

FORMAT_VERSION = 2  # 1: texts did not begin with what the tokenizer's post-processor puts before them
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

assistant = ssmvl.load("path or id of this folder")
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
    """Write what `saved_folder` finds; an older such folder stays until the new one is complete.

    A model card that lies there and is not ours stays.

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
    ours = _card(blueprint.recipe)
    texts = {
        "recipe.yaml": blueprint.recipe.to_yaml(),
        CARD_FILE: card.read_bytes().decode(errors=BYTES) if card.is_file() and not is_ours(card) else ours,
        ABOUT_FILE: json.dumps(about, indent=2) + "\n",
    }
    write_files(folder, own, texts | tokenizer_files(processor))


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, without the names of wrappers (torch.compile, DDP, DataParallel) around its parts."""
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
    """Check that what is saved can be loaded with the recipe: names, shapes, finite values, tokenizer and prompt.

    Args:
        folder: for messages.
        tensors: of the model, by name.
        blueprint: of the recipe that is saved with them.
        processor: saved with them.
        model: if given, its settings are compared with the recipe's too.

    Returns:
        The tensors to write. Tied ones appear once, under their first name. Others that share memory are copied.

    Raises:
        CheckpointError: it cannot be loaded; says why.
    """
    what = f"{folder} is not written"
    others = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if others:
        raise CheckpointError(
            f"{what}: {short(', '.join(others[:5]))} are not tensors; quantized models cannot be saved"
        )
    described = blueprint.model
    try:
        NATIVE_LAYOUT.check(described, tensors, f"{what}: what should be saved")
        if model is not None:
            require_same_settings(model, described)
    except CheckpointError as error:
        advice = "merge adapters (merge_and_unload), and remove parametrizations, weight_norm and pruning first"
        told = str(error) if str(error).startswith(what) else f"{what}: {error}"
        raise CheckpointError(f"{told}\n{advice}; another model needs its own recipe") from error
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CheckpointError(f"{what}: a model on meta holds no weights")
    wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if wrong:
        raise CheckpointError(
            f"{what}: {len(wrong)} of {len(tensors)} tensors are not finite: {short(', '.join(wrong[:5]))}"
        )
    ids, allowed = processor.tokenizer.get_vocab_size(), described.language.num_tokens
    if ids != allowed:
        raise CheckpointError(f"{what}: the tokenizer has {ids} ids, the language model {allowed}")
    prompt, given = cast(Prompt, blueprint.parts.prompt()), processor.prompt
    if type(prompt) is not type(given) or vars(prompt) != vars(given):
        names = f"{type(processor.prompt).__name__}, the recipe's is {type(prompt).__name__}"
        raise CheckpointError(f"{what}: the processor's prompt is {names}; name it as model.prompt of the recipe")
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in NATIVE_LAYOUT.sources(described):
        place = tensors[name].untyped_storage().data_ptr()
        own[name] = tensors[name].clone() if place in seen else tensors[name]
        seen.add(place)
    return own


def write_files(folder: str | Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """`write_folder`, of a folder as a user names it.

    Raises:
        CheckpointError: the folder holds other files, which would be lost; a file is in its way; or it cannot be
            written.
    """
    try:
        write_folder(Path(folder).expanduser(), tensors, texts)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written as a folder ({error})") from error


def is_ours(card: str | Path) -> bool:
    """Whether a model card has the line with which ours says that it may be replaced."""
    return OURS.encode() in Path(card).read_bytes()


def tokenizer_files(processor: Processor) -> dict[str, str]:
    """The processor's tokenizer as two files that we and transformers read, by name."""
    return {TOKENIZER_FILE: processor.tokenizer.to_str(pretty=True), CONFIG_FILE: config_text(processor.end)}


def saved_folder(name: str | Path) -> tuple[Path, int]:
    """The folder of a saved model, and its format version.

    Args:
        name: the folder, one whose folder `model` it is, as of a run, or the id of a model in the hub, which is
            fetched.

    Raises:
        CheckpointError: it holds no model, or one of a newer format.
    """
    folder = local(name, "*.safetensors", "*.json", "*.yaml", DIGESTS_FILE)
    try:
        folder = folder / "model" if (folder / "model" / ABOUT_FILE).is_file() else folder
        about = json.loads((folder / ABOUT_FILE).read_text())
        version, plugins = int(about["format_version"]), [Plugin(**plugin) for plugin in about.get("plugins", [])]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{folder} holds no saved model: {ABOUT_FILE} cannot be read ({type(error).__name__}: {error}). "
            "Weights from elsewhere need a recipe: ssmvl.load(WEIGHTS, recipe=NAME)"
        ) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}; this ssmvl reads up to {FORMAT_VERSION}; update it"
        )
    _require_plugins(folder, plugins)
    return folder, version


def plugins_of(blueprint: Blueprint) -> list[dict[str, str]]:
    """The plugins that the components of a model come from, as plain data."""
    found = {bound.entry.plugin for bound in components_in(blueprint.parts) if bound.entry and bound.entry.plugin}
    return [plugin._asdict() for plugin in sorted(found)]


def _require_plugins(folder: Path, plugins: Iterable[Plugin]) -> None:
    """Check that the plugins that a model was saved with are installed, in whatever version."""
    registry = components()
    there = {(entry.plugin.distribution, entry.plugin.name) for entry in registry.entries() if entry.plugin}
    for plugin in plugins:
        if (plugin.distribution, plugin.name) in there:
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
