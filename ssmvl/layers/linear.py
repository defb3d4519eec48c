"""Calls of layers that adapters, quantization, parametrizations or hooks may have changed, without bypassing them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from ssmvl.errors import ContractError

__all__ = ["cast_for", "conv_taps", "is_plain"]


def cast_for(x: Tensor, module: nn.Module) -> Tensor:
    """Cast x to the compute dtype of a layer: that of its weight, or of a container's first floating-point parameter.

    A layer with a quantized weight (4 or 8 bits) casts its input itself; x is returned unchanged.
    """
    weight = getattr(module, "weight", None)
    for parameter in [weight] if isinstance(weight, Tensor) else module.parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1:  # float8 is for storage only
            return x.to(parameter.dtype)
    return x


def is_plain(layer: nn.Module) -> bool:
    """Return True if using a Linear's weight is equivalent to calling it: nothing wraps, replaces or hooks it."""
    hooks = (
        layer._forward_pre_hooks,
        layer._forward_hooks,
        layer._backward_pre_hooks,
        layer._backward_hooks,
    )
    return type(layer) is nn.Linear and "forward" not in layer.__dict__ and not any(hooks)


def conv_taps(conv: nn.Conv1d) -> Tensor:
    """Return the taps (C, W) of a depthwise convolution. The op uses them directly, so the layer is not called.

    The layer's forward and backward hooks do not run. They raise no error, because they may only observe.

    Raises:
        ContractError: something wraps the layer, or changes its weight during a call, and would be bypassed.
    """
    if not isinstance(conv, nn.Conv1d) or (type(conv) is not nn.Conv1d and not is_parametrized(conv)):
        raise ContractError(
            f"the mixer's conv1d is a {type(conv).__name__}, which would be bypassed: the mixer reads its taps and "
            "does not call it. Exclude conv1d from the layers that adapters or quantization replace"
        )
    if conv._forward_pre_hooks or "forward" in conv.__dict__:
        raise ContractError(
            "the mixer's conv1d has forward pre-hooks or a replaced forward, which would be bypassed: the mixer reads "
            "its taps and does not call it. Use torch.nn.utils.parametrizations instead of weight_norm, spectral_norm "
            "or pruning by hooks"
        )
    return conv.weight.squeeze(1)


def per_path(x: Tensor, linear: nn.Module, count: int) -> Tensor:
    """X (*, count*I) -> (*, count*O): each path's part of x times the path's rows of a Linear's weight (count*O, I).

    For a plain Linear, the weight is used directly and the bias is left to the caller, who adds it in fp32. Any other
    layer is called, with its bias, and its outputs for the rows of other paths are dropped.
    """
    if not is_plain(linear):
        outputs = linear(x.unflatten(-1, (count, -1))).unflatten(-1, (count, -1))
        return outputs.diagonal(dim1=-3, dim2=-2).mT.flatten(-2)
    weight = cast(nn.Linear, linear).weight
    if count == 1:
        return F.linear(x, weight)
    return torch.einsum("...ki,koi->...ko", x.unflatten(-1, (count, -1)), weight.unflatten(0, (count, -1))).flatten(-2)
