"""The check of checkpoint layouts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmvl.checkpoints import Layout
from ssmvl.errors import CheckpointError, ContractError
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.testing.common import name_of, require

STRANGER = "some.other.weight"


def check_checkpoint(
    layout: Callable[..., Layout | None],
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    config: Mapping[str, Any] | None = None,
) -> None:
    """The layout recognises its own files only, fills all of a module from one, and refuses one that is not whole.

    `check_checkpoint(my_layout, tensors_of_a_small_file, the_model_they_are_of)`.

    Args:
        layout: called with the names in a file and its config.
        tensors: of a small file of this layout.
        module: the language model or whole model they fit; its values are overwritten.
        config: what the file's `config.json` holds, if it has one.

    Raises:
        ContractError: it does not; names the claim and the tensor.
    """
    name, config = name_of(layout), config or {}
    for others in ([], [STRANGER]):
        for given in ({}, config):
            require(_asked(layout, others, given) is None, f"{name} must give None for the names {others}")
    found = _asked(layout, tensors.keys(), config)
    require(isinstance(found, Layout), f"{name} must give a Layout for its own file, gave {found!r}")
    assert isinstance(found, Layout)
    part = "model" if isinstance(module, VisionLanguageModel) else "language"
    require(found.part == part, f"{name}: part must be {part!r} for a {type(module).__name__}, is {found.part!r}")
    unfilled = _loaded_over(torch.nan, found, tensors, module, name)
    of_file = _loaded_over(0.0, found, tensors, module, name)  # a file may hold NaN itself
    absent = tuple(f"{prefix}." for prefix in found.absent)
    left = [own for own, nan in unfilled.items() if (nan & ~of_file[own]).any() and not own.startswith(absent)]
    require(
        not left, f"{name}: the file must fill all of the module; {', '.join(left[:5])} still hold their old values"
    )
    for lacking in (theirs for names in found.sources(module).values() for theirs in names):
        less = {key: tensor for key, tensor in tensors.items() if key != lacking}
        require(_refused(found, module, less, name), f"{name}: a file without {lacking} must be refused")
    more = {**tensors, STRANGER: torch.zeros(1)}
    require(_refused(found, module, more, name), f"{name}: a file that holds {STRANGER} too must be refused")


def _asked(layout: Callable[..., Layout | None], names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    try:
        return layout(names=names, config=config)
    except Exception as error:  # foreign code may raise anything
        shown = f"{type(error).__name__}: {error}"
        raise ContractError(f"{name_of(layout)} failed for the names {sorted(names)[:3]} ({shown})") from error


@torch.no_grad()
def _loaded_over(
    value: float, layout: Layout, tensors: Mapping[str, Tensor], module: nn.Module, name: str
) -> dict[str, Tensor]:
    """Where each parameter is NaN after all were set to `value` and the file was loaded."""
    for parameter in module.parameters():
        parameter.fill_(value)
    try:
        layout.load(module, tensors, name)
    except CheckpointError as error:
        require(False, f"{name} must fit the module it is checked with: {error}")
    return {own: parameter.isnan() for own, parameter in module.named_parameters()}


def _refused(layout: Layout, module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> bool:
    try:
        layout.check(module, tensors, name)
    except CheckpointError:
        return True
    return False
