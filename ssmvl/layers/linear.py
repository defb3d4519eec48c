"""Layers that may be wrapped: called as they are, with adapters, quantized weights, parametrizations and hooks."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from ssmvl.errors import ContractError

__all__ = ["cast_for", "conv_taps", "is_plain"]


def cast_for(x: Tensor, module: nn.Module) -> Tensor:
    """Cast x to the dtype that a layer computes in: its weight's, or that of a container's first parameter with one.

    A layer whose weight is not floating point (4 and 8 bits) casts its input itself; x stays as it is.
    """
    weight = getattr(module, "weight", None)
    for parameter in [weight] if isinstance(weight, Tensor) else module.parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1:  # float8 is for storage only
            return x.to(parameter.dtype)
    return x


def is_plain(layer: nn.Module) -> bool:
    """Check that reading the weight of a Linear does the same as calling it: nothing wraps, replaces or hooks it."""
    hooks = (
        layer._forward_pre_hooks,
        layer._forward_hooks,
        layer._backward_pre_hooks,
        layer._backward_hooks,
    )
    return type(layer) is nn.Linear and "forward" not in layer.__dict__ and not any(hooks)


def conv_taps(conv: nn.Conv1d) -> Tensor:
    """The taps (C, W) of a depthwise convolution, whose layer is not called: the op works on taps.

    Forward and backward hooks of the layer, which may do no more than watch, do not run.

    Raises:
        ContractError: something wraps the layer, or changes its weight when it is called, and would be bypassed.
    """
    if not isinstance(conv, nn.Conv1d) or (type(conv) is not nn.Conv1d and not is_parametrized(conv)):
        raise ContractError(
            f"the mixer's conv1d is a {type(conv).__name__}, which would be bypassed: the mixer reads its taps and "
            "does not call it. Leave conv1d out of the layers that adapters or quantization replace"
        )
    if conv._forward_pre_hooks or "forward" in conv.__dict__:
        raise ContractError(
            "the mixer's conv1d has forward pre-hooks or a forward of its own, which would be bypassed: the mixer "
            "reads its taps and does not call it. Use torch.nn.utils.parametrizations in place of weight_norm, "
            "spectral_norm or pruning by hooks"
        )
    return conv.weight.squeeze(1)


def per_path(x: Tensor, linear: nn.Module, count: int) -> Tensor:
    """X (*, count*I) -> (*, count*O): each path's part by its own rows (count*O, I) of a Linear.

    The weight of a plain Linear is read, and its bias left to the caller, who adds it in fp32. Any other layer is
    called, with its bias, and what it gives for the rows of other paths is dropped.
    """
    if not is_plain(linear):
        every = linear(x.unflatten(-1, (count, -1))).unflatten(-1, (count, -1))
        return every.diagonal(dim1=-3, dim2=-2).mT.flatten(-2)
    weight = cast(nn.Linear, linear).weight
    if count == 1:
        return F.linear(x, weight)
    return torch.einsum("...ki,koi->...ko", x.unflatten(-1, (count, -1)), weight.unflatten(0, (count, -1))).flatten(-2)
