"""Check of checkpoint layouts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmvl.checkpoints import Layout
from ssmvl.errors import CheckpointError, ContractError
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.testing.common import name_of, require

UNKNOWN = "some.other.weight"


def check_checkpoint(
    layout: Callable[..., Layout | None],
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Check that a layout recognizes only its own files, fills the whole module, and rejects incomplete files.

    `check_checkpoint(my_layout, tensors_of_a_small_file, the_model_they_are_of)`.

    Args:
        layout: called with the tensor names of a file and its config.
        tensors: the tensors of a small file in this layout.
        module: the language model or whole model that they fit; its values are overwritten.
        config: the content of the file's `config.json`, if it has one.

    Raises:
        ContractError: the layout violates its contract; names the requirement and the tensor.
    """
    name, config = name_of(layout), config or {}
    for other_names in ([], [UNKNOWN]):
        for given in ({}, config):
            found = _layout_for(layout, other_names, given)
            require(found is None, f"{name} must return None for the names {other_names}")
    found = _layout_for(layout, tensors.keys(), config)
    require(isinstance(found, Layout), f"{name} must return a Layout for its own file, returned {found!r}")
    assert isinstance(found, Layout)
    part = "model" if isinstance(module, VisionLanguageModel) else "language"
    require(found.part == part, f"{name}: part must be {part!r} for a {type(module).__name__}, is {found.part!r}")
    nan_after = _nan_after_load(torch.nan, found, tensors, module, name)
    nan_in_file = _nan_after_load(0.0, found, tensors, module, name)  # a file may contain NaN itself
    absent = tuple(f"{prefix}." for prefix in found.absent)
    unfilled = [own for own, nan in nan_after.items() if (nan & ~nan_in_file[own]).any() and not own.startswith(absent)]
    require(
        not unfilled, f"{name}: the file must fill the whole module, but does not set all of {', '.join(unfilled[:5])}"
    )
    for removed in (file_name for file_names in found.sources(module).values() for file_name in file_names):
        incomplete = {key: tensor for key, tensor in tensors.items() if key != removed}
        require(_is_rejected(found, module, incomplete, name), f"{name}: a file without {removed} must be rejected")
    surplus = {**tensors, UNKNOWN: torch.zeros(1)}
    require(_is_rejected(found, module, surplus, name), f"{name}: a file with an extra {UNKNOWN} must be rejected")


def _layout_for(
    layout: Callable[..., Layout | None], names: Collection[str], config: Mapping[str, Any]
) -> Layout | None:
    try:
        return layout(names=names, config=config)
    except Exception as error:  # third-party code may raise anything
        shown = f"{type(error).__name__}: {error}"
        raise ContractError(f"{name_of(layout)} failed for the names {sorted(names)[:3]} ({shown})") from error


@torch.no_grad()
def _nan_after_load(
    value: float, layout: Layout, tensors: Mapping[str, Tensor], module: nn.Module, name: str
) -> dict[str, Tensor]:
    """NaN mask of each parameter after filling all with `value` and loading the file."""
    for parameter in module.parameters():
        parameter.fill_(value)
    try:
        layout.load(module, tensors, name)
    except CheckpointError as error:
        require(False, f"{name} must fit the module that it is checked with: {error}")
    return {own: parameter.isnan() for own, parameter in module.named_parameters()}


def _is_rejected(layout: Layout, module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> bool:
    try:
        layout.check(module, tensors, name)
    except CheckpointError:
        return True
    return False
