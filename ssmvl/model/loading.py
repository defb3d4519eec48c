"""The files that a model starts from: found, opened, recognized among the layouts, compared with their parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ssmvl.checkpoints import Layout, OpenedCheckpoint, open_checkpoint
from ssmvl.checkpoints.files import DIGESTS_FILE
from ssmvl.checkpoints.foreign import wrapper_of
from ssmvl.checkpoints.hub import local
from ssmvl.checkpoints.layouts import Fitted, copy_fitted
from ssmvl.errors import CheckpointError, ContractError, foreign, short
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.plugins import components

UNWRAP = "unwrap:"
PARTS = {  # contents of a file of each part, and the key of a recipe that names it
    "language": ("a language model", "model.language.weights"),
    "encoder": ("an encoder", "model.encoders.NAME.weights"),
    "model": ("a whole model", "init_from of a stage, or weights= of build_model"),
}


@dataclass
class Weights:
    """An opened checkpoint, its layout, and the part of a model that it fills.

    Attributes:
        found: the file.
        layout: its layout.
        part: dotted name of the part; empty for a whole model.
        fitted: the tensors for that part, once they were compared with it.
    """

    found: OpenedCheckpoint
    layout: Layout
    part: str = ""
    fitted: Fitted = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The file, for messages."""
        return self.found.source

    @property
    def fills_model(self) -> bool:
        """True if the file holds every tensor of a whole model."""
        return self.layout.part == "model" and not self.layout.absent

    def check(self, module: nn.Module) -> None:
        """Compare them with the part that the layout is of, which may be on `meta`.

        Raises:
            CheckpointError: they do not fit.
        """
        try:
            self.fitted = self.layout.fit(module, self.found.tensors, self.source)
        except CheckpointError as error:
            advice = _advice(self.found) if self.layout.part == "encoder" else ""  # `model.` may be meant elsewhere
            raise CheckpointError(f"{error}{advice}") from error

    def load(self, module: nn.Module) -> None:
        """Copy them into the part that the layout is of, cast to its dtypes.

        Raises:
            CheckpointError: they do not fit; nothing was copied.
        """
        self.check(module)
        copy_fitted(module, self.fitted)

    def copy_into(self, model: VisionLanguageModel) -> None:
        """Copy them into a model equal to the one they were compared with."""
        copy_fitted(model.get_submodule(self.part), self.fitted)


StartingWeights = list[Weights]


def starting_weights(model: VisionLanguageModel, name: str | Path, *, verify: bool = True) -> StartingWeights:
    """Open every file that a model starts from.

    Args:
        model: on `meta`.
        name: `none`, `recipe` for those that the parts name, or a checkpoint of a whole model.
        verify: see `open_checkpoint`.

    Raises:
        CheckpointError: a file is missing or not recognized.
    """
    if name == "none":
        return []
    opened: StartingWeights = []
    named = parts_with_weights(model)
    if name != "recipe":
        named.pop("language", None)
        opened.append(open_weights(name, "model", verify=verify))
    if not any(one.fills_model for one in opened):
        opened += [open_part(model, part, verify=verify) for part in named]
    return opened


def parts_with_weights(model: VisionLanguageModel) -> dict[str, str]:
    """The weights that parts of a model name, by part: `language`, `encoders.NAME`."""
    parts: dict[str, Any] = {"language": model.language}
    own = {name: encoder for name, encoder in model.encoders.items() if not hasattr(encoder, "load_weights")}
    parts |= {f"encoders.{name}": encoder for name, encoder in own.items()}
    return {name: str(part.weights) for name, part in parts.items() if part.weights != "none"}


def open_part(model: VisionLanguageModel, part: str, *, verify: bool = True) -> Weights:
    """Open the file that a part of a model names.

    Raises:
        CheckpointError: it is missing or not recognized.
    """
    module: Any = model.get_submodule(part)
    kind: Literal["language", "encoder"] = "language" if part == "language" else "encoder"
    opened = open_weights(module.weights, kind, getattr(module, "weights_layout", None), verify=verify)
    opened.part = part
    return opened


def open_weights(
    name: str | Path,
    part: Literal["language", "encoder", "model"],
    own: Callable[[Collection[str], Mapping[str, Any]], Layout] | None = None,
    *,
    verify: bool = True,
) -> Weights:
    """Open a checkpoint and recognize its layout; no tensor is read yet.

    Args:
        name: a file, a folder, or the id of a model in the hub, which is fetched; after `unwrap:` if the prefixes that
            wrappers add to names are to be stripped.
        part: what it is to fill.
        own: gives the layout where the part has its own; else it is recognized among the registered ones.
        verify: whether files are compared with the digests beside them, see `open_checkpoint`.

    Raises:
        CheckpointError: it cannot be found or read, no registered layout or more than one recognizes it, the config
            that its layout needs is not beside it, or its layout fills another part.
    """
    unwrap = str(name).startswith(UNWRAP)
    place = str(name).removeprefix(UNWRAP) if unwrap else name
    path = local(place, "*.safetensors", "*.json", "recipe.yaml", DIGESTS_FILE)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        path = local(place, "*.bin", "*.pt", "*.pth", "*.json")  # in the hub, an older model
    found = open_checkpoint(path, verify=verify, unwrap=unwrap)
    layout = _recognized(found) if own is None else _own_layout(own, found)
    if layout.part != part:
        noun, where = PARTS[layout.part]
        raise CheckpointError(f"{found.source}: this file holds {noun}; load it with {where}")
    return Weights(found, layout)


def _own_layout(own: Callable[[Collection[str], Mapping[str, Any]], Layout], found: OpenedCheckpoint) -> Layout:
    try:
        return own(found.tensors.keys(), found.config)
    except CheckpointError as error:
        raise CheckpointError(f"{found.source}: {error}") from error
    except (Exception, SystemExit) as error:  # foreign code, which a strange config may break anywhere
        what = f"the config beside it does not describe such a model ({foreign(error)})"
        raise CheckpointError(f"{found.source}: {what}") from error


def _recognized(found: OpenedCheckpoint) -> Layout:
    """The one registered layout that recognizes a checkpoint."""
    layouts, failures, refused = {}, "", []
    registered = components().names("checkpoint")
    for known in registered:
        try:
            layout = components().find("checkpoint", known).load()(names=found.tensors.keys(), config=found.config)
            if not (layout is None or isinstance(layout, Layout)):
                raise ContractError(f"it must give a Layout or None, gave {layout!r}")
        except CheckpointError as error:  # its kind of file, but not one that it can read
            refused.append(str(error))
            continue
        except (Exception, SystemExit) as error:  # foreign code: it breaks no other layout
            failures += f"\ncheckpoint {known!r} failed: {foreign(error)}"
            continue
        if layout is not None:
            layouts[known] = layout
    if refused and not layouts:
        raise CheckpointError(f"{found.source}: {'; '.join(refused)}")
    if len(layouts) != 1:
        what = f"{' and '.join(layouts)} all recognize" if layouts else "no registered layout recognizes"
        first = short(", ".join(sorted(found.tensors)[:3]))
        kind = found.config.get("model_type")
        config = f"; its config.json has model_type {kind!r}" if kind and not layouts else ""
        raise CheckpointError(
            f"{found.source}: {what} its names ({first}, …){config}. Layouts: {', '.join(registered)}{failures}"
            + _advice(found)
        )
    (layout,) = layouts.values()
    return layout


def _advice(found: OpenedCheckpoint) -> str:
    """Advice for a file whose names all begin with the prefix of a wrapper; empty for others."""
    prefix = wrapper_of(found.tensors)
    return f"\nEach name begins with {prefix!r}, which a wrapper adds; {UNWRAP}PATH strips it" if prefix else ""
