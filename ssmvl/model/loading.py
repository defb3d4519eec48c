"""Which weights a model starts from: opened, recognised among the registered layouts, put into its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from torch import nn

from ssmvl.checkpoints import Foreign, Layout, open_checkpoint
from ssmvl.checkpoints.files import DIGESTS_FILE
from ssmvl.checkpoints.hub import local
from ssmvl.errors import CheckpointError, ContractError, short
from ssmvl.plugins import components


class Weights(NamedTuple):
    """An opened checkpoint and the layout it has."""

    found: Foreign
    layout: Layout

    def check(self, module: nn.Module) -> None:
        """Compare them with the part that the layout is of; it may be on `meta`.

        Raises:
            CheckpointError: they do not fit.
        """
        self.layout.check(module, self.found.tensors, self.found.source)

    def load(self, module: nn.Module) -> None:
        """Copy them into the part that the layout is of, cast to its dtypes.

        Raises:
            CheckpointError: they do not fit; nothing was copied.
        """
        self.layout.load(module, self.found.tensors, self.found.source)


def open_weights(name: str | Path, part: Literal["language", "model"], *, verify: bool = True) -> Weights:
    """Open a checkpoint and recognise its layout; no tensor is read yet.

    Args:
        name: a file, a folder, or the id of a model in the hub, which is fetched.
        part: what it shall fill.
        verify: whether files are compared with the digests beside them, see `open_checkpoint`.

    Raises:
        CheckpointError: it cannot be found or read, no registered layout or more than one recognises it, the config
            that its layout needs is not beside it, or it is one of another part.
    """
    path = local(name, "*.safetensors", "*.json", "recipe.yaml", DIGESTS_FILE)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        path = local(name, "*.bin", "*.pt", "*.pth", "*.json")  # in the hub, an older model
    found = open_checkpoint(path, verify=verify)
    layouts, failures, refused = {}, "", []
    for known in components().names("checkpoint"):
        try:
            layout = components().find("checkpoint", known).load()(names=found.tensors.keys(), config=found.config)
            if not (layout is None or isinstance(layout, Layout)):
                raise ContractError(f"it must give a Layout or None, gave {layout!r}")
        except CheckpointError as error:  # its kind of file, but not one that it can read
            refused.append(str(error))
            continue
        except Exception as error:  # foreign code: it breaks no other layout
            failures += f"\ncheckpoint {known!r} failed: {type(error).__name__}: {error}"
            continue
        if layout is not None:
            layouts[known] = layout
    if refused and not layouts:
        raise CheckpointError(f"{found.source}: {'; '.join(refused)}")
    if len(layouts) != 1:
        what = f"{' and '.join(layouts)} all recognise" if layouts else "no registered layout recognises"
        first, known = short(", ".join(sorted(found.tensors)[:3])), ", ".join(components().names("checkpoint"))
        raise CheckpointError(f"{found.source}: {what} its names ({first}, …). Layouts: {known}{failures}")
    ((known, layout),) = layouts.items()
    if layout.part != part:
        where = "model.language.weights" if layout.part == "language" else "weights= of build_model"
        raise CheckpointError(f"{found.source}: its layout {known!r} is of a {layout.part}; name it as {where}")
    return Weights(found, layout)
