"""The check of checkpoint layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmvl.checkpoints import Layout
from ssmvl.errors import CheckpointError
from ssmvl.testing.common import name_of, require


def check_checkpoint(
    layout: Callable[..., Layout | None],
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    config: Mapping[str, Any] | None = None,
) -> None:
    """The layout recognises its own files only, fills all of a module from one, and refuses one that lacks a tensor.

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
    for others in ([], ["some.other.weight"]):
        require(layout(names=others, config={}) is None, f"{name} must give None for the names {others}")
    found = layout(names=tensors.keys(), config=config)
    require(isinstance(found, Layout), f"{name} must give a Layout for its own file, gave {found!r}")
    assert isinstance(found, Layout)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    try:
        found.load(module, tensors, name)
    except CheckpointError as error:
        require(False, f"{name} must fit the module it is checked with: {error}")
    left = [
        own
        for own, parameter in module.named_parameters()
        if parameter.isnan().any() and not own.startswith(tuple(f"{prefix}." for prefix in found.absent))
    ]
    require(
        not left, f"{name}: the file must fill all of the module; {', '.join(left[:5])} still hold their old values"
    )
    for lacking in (theirs for names in found.sources(module).values() for theirs in names):
        try:
            found.check(module, {key: tensor for key, tensor in tensors.items() if key != lacking}, name)
        except CheckpointError:
            continue
        require(False, f"{name}: a file without {lacking} must be refused")
