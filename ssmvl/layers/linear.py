"""Use of layers that adapters, quantization, parametrizations or hooks may modify, without bypassing the changes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from ssmvl.errors import ContractError

__all__ = ["cast_for", "conv_taps", "is_plain"]


def cast_for(x: Tensor, module: nn.Module) -> Tensor:
    """Cast x to a layer's compute dtype: that of its weight or, for a container, its first floating-point parameter.

    A layer with a quantized weight (4 or 8 bits) casts its input itself, so x is returned unchanged.
    """
    weight = getattr(module, "weight", None)
    for parameter in [weight] if isinstance(weight, Tensor) else module.parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1:  # float8 is for storage only
            return x.to(parameter.dtype)
    return x


def is_plain(layer: nn.Module) -> bool:
    """Return True if a Linear's weight may be applied directly: nothing wraps, replaces or hooks the layer."""
    hooks = (
        layer._forward_pre_hooks,
        layer._forward_hooks,
        layer._backward_pre_hooks,
        layer._backward_hooks,
    )
    return type(layer) is nn.Linear and "forward" not in layer.__dict__ and not any(hooks)


def conv_taps(conv: nn.Conv1d) -> Tensor:
    """Return the taps (C, W) of a depthwise convolution. The op uses them directly, so the layer is not called.

    The layer's forward and backward hooks do not run. They are accepted anyway, because they might only observe;
    forward pre-hooks are rejected.

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
    """Multiply each path's part of x by that path's rows of a Linear's weight: (*, count*I) -> (*, count*O).

    The weight is (count*O, I). For a plain Linear, it is used directly, and the caller adds the bias in fp32. Any other
    layer is called and adds its own bias. It applies all rows to each path's part; the rows of other paths are dropped.
    """
    if not is_plain(linear):
        outputs = linear(x.unflatten(-1, (count, -1))).unflatten(-1, (count, -1))
        return outputs.diagonal(dim1=-3, dim2=-2).mT.flatten(-2)
    weight = cast(nn.Linear, linear).weight
    if count == 1:
        return F.linear(x, weight)
    return torch.einsum("...ki,koi->...ko", x.unflatten(-1, (count, -1)), weight.unflatten(0, (count, -1))).flatten(-2)
