"""Pretrained weights of a model: find and open files, recognize their layout, compare them with their parts."""

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
PARTS = {  # by part: what such a file holds, and the option that names it
    "language": ("a language model", "model.language.weights"),
    "encoder": ("an encoder", "model.encoders.NAME.weights"),
    "model": ("a whole model", "init_from of a stage, or weights= of build_model"),
}


@dataclass
class Weights:
    """An opened checkpoint, its layout, and the part of a model that it fills.

    Attributes:
        checkpoint: the opened file.
        layout: its layout.
        part: dotted name of the part; empty for a whole model.
        fitted: the tensors for that part, after they have been compared with it.
    """

    checkpoint: OpenedCheckpoint
    layout: Layout
    part: str = ""
    fitted: Fitted = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Path of the file, for messages."""
        return self.checkpoint.source

    @property
    def fills_model(self) -> bool:
        """True if the file holds every tensor of a whole model."""
        return self.layout.part == "model" and not self.layout.absent

    def check(self, module: nn.Module) -> None:
        """Compare the tensors with the part that the layout describes, which may be on `meta`.

        Raises:
            CheckpointError: the tensors do not fit.
        """
        try:
            self.fitted = self.layout.fit(module, self.checkpoint.tensors, self.source)
        except CheckpointError as error:
            advice = _advice(self.checkpoint) if self.layout.part == "encoder" else ""  # others may have prefixes
            raise CheckpointError(f"{error}{advice}") from error

    def load(self, module: nn.Module) -> None:
        """Copy the tensors into the part that the layout describes, cast to its dtypes.

        Raises:
            CheckpointError: the tensors do not fit; nothing is copied.
        """
        self.check(module)
        copy_fitted(module, self.fitted)

    def copy_into(self, model: VisionLanguageModel) -> None:
        """Copy the tensors into a model equal to the one that they were compared with."""
        copy_fitted(model.get_submodule(self.part), self.fitted)


StartingWeights = list[Weights]


def starting_weights(model: VisionLanguageModel, name: str | Path, *, verify: bool = True) -> StartingWeights:
    """Open all pretrained weights of a model.

    Args:
        model: on `meta`.
        name: `none`, `recipe` for the weights that the parts name, or a checkpoint of a whole model.
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
    if not any(weights.fills_model for weights in opened):
        opened += [open_part(model, part, verify=verify) for part in named]
    return opened


def parts_with_weights(model: VisionLanguageModel) -> dict[str, str]:
    """Return the weights that parts of a model name, by part: `language`, `encoders.NAME`."""
    parts: dict[str, Any] = {"language": model.language}
    own = {name: encoder for name, encoder in model.encoders.items() if not hasattr(encoder, "load_weights")}
    parts |= {f"encoders.{name}": encoder for name, encoder in own.items()}
    return {name: str(part.weights) for name, part in parts.items() if part.weights != "none"}


def open_part(model: VisionLanguageModel, part: str, *, verify: bool = True) -> Weights:
    """Open the file of weights that a part of a model names.

    Raises:
        CheckpointError: the file is missing or not recognized.
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
    """Open a checkpoint and recognize its layout. Reads no tensor yet.

    Args:
        name: a file, a directory, or a Hub id, which is downloaded. The prefix `unwrap:` strips the prefixes that
            wrappers add to tensor names.
        part: the part to fill.
        own: returns the layout if the part has its own; if None, the registered layouts are tried.
        verify: whether files are compared with the digests next to them, see `open_checkpoint`.

    Raises:
        CheckpointError: the checkpoint cannot be found or read, is not recognized by exactly one registered layout,
            lacks the config that its layout needs, or has the layout of another part.
    """
    unwrap = str(name).startswith(UNWRAP)
    source = str(name).removeprefix(UNWRAP) if unwrap else name
    path = local(source, "*.safetensors", "*.json", "recipe.yaml", DIGESTS_FILE)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        path = local(source, "*.bin", "*.pt", "*.pth", "*.json")  # an older model on the Hub
    checkpoint = open_checkpoint(path, verify=verify, unwrap=unwrap)
    layout = _recognize(checkpoint) if own is None else _own_layout(own, checkpoint)
    if layout.part != part:
        noun, option = PARTS[layout.part]
        raise CheckpointError(f"{checkpoint.source}: this file holds {noun}; load it with {option}")
    return Weights(checkpoint, layout)


def _own_layout(own: Callable[[Collection[str], Mapping[str, Any]], Layout], checkpoint: OpenedCheckpoint) -> Layout:
    try:
        return own(checkpoint.tensors.keys(), checkpoint.config)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from error
    except (Exception, SystemExit) as error:  # third-party code, which an unusual config may break anywhere
        what = f"the config next to it does not describe such a model ({foreign(error)})"
        raise CheckpointError(f"{checkpoint.source}: {what}") from error


def _recognize(checkpoint: OpenedCheckpoint) -> Layout:
    """Return the one registered layout that recognizes a checkpoint."""
    layouts, failures, rejections = {}, "", []
    registered, names, config = components().names("checkpoint"), checkpoint.tensors.keys(), checkpoint.config
    for kind in registered:
        try:
            layout = components().find("checkpoint", kind).load()(names=names, config=config)
            if not (layout is None or isinstance(layout, Layout)):
                raise ContractError(f"it must return a Layout or None, returned {layout!r}")
        except CheckpointError as error:  # recognized, but not readable
            rejections.append(str(error))
            continue
        except (Exception, SystemExit) as error:  # third-party code must not break other layouts
            failures += f"\ncheckpoint {kind!r} failed: {foreign(error)}"
            continue
        if layout is not None:
            layouts[kind] = layout
    if rejections and not layouts:
        raise CheckpointError(f"{checkpoint.source}: {'; '.join(rejections)}")
    if len(layouts) != 1:
        what = f"{' and '.join(layouts)} all recognize" if layouts else "no registered layout recognizes"
        first = short(", ".join(sorted(names)[:3]))
        model_type = config.get("model_type")
        hint = f"; its config.json has model_type {model_type!r}" if model_type and not layouts else ""
        raise CheckpointError(
            f"{checkpoint.source}: {what} its names ({first}, …){hint}. Layouts: {', '.join(registered)}{failures}"
            + _advice(checkpoint)
        )
    (layout,) = layouts.values()
    return layout


def _advice(checkpoint: OpenedCheckpoint) -> str:
    """Return advice for a file whose names all begin with the prefix of a wrapper; empty for others."""
    prefix = wrapper_of(checkpoint.tensors)
    return f"\nEach name begins with {prefix!r}, which a wrapper adds; {UNWRAP}PATH strips it" if prefix else ""
