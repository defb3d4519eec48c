"""Emulate a GPU or CPU on `meta`: autocast, tiled attention, and the tile sizes that ops use on that device."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssmvl.training.planning.memory_ledger import CASTS, Ledger

# Ops that autocast runs in bf16 (LOWER) and in fp32 (FULL); only those that models here call.
LOWER = {
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.mm, torch.baddbmm, torch.addmm, torch.einsum),
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.multi_head_attention_forward),
}
FULL = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax}
IS_CPU = cast(Any, Tensor.is_cpu).__get__


class Device(TorchFunctionMode):
    """Emulates a GPU under bf16 autocast, or a CPU in fp32, for tensors on `meta`.

    Autocast applies only while gradients are enabled: ops with their own backward disable autocast, and only they
    disable gradients.
    """

    def __init__(self, gpu: bool, ledger: Ledger) -> None:
        super().__init__()
        self._gpu, self.ledger = gpu, ledger
        self._casts: dict[Tensor, Tensor] | None = {}

    def end_forward(self) -> None:
        """Drop autocast's copies of weights; copies made in backward are not kept."""
        self._casts = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is IS_CPU:
            return not self._gpu
        attention = func is F.scaled_dot_product_attention
        if self._gpu and torch.is_grad_enabled():
            if attention or func in LOWER:
                args, kwargs = self._cast((args, kwargs), torch.bfloat16)
            elif func in FULL:
                args, kwargs = self._cast((args, kwargs), torch.float32)
        return _attention(*args, **kwargs) if attention else func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._cast(item, dtype) for item in value)
        if isinstance(value, dict):
            return {key: self._cast(item, dtype) for key, item in value.items()}
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if self._casts is not None and value in self._casts:
            return self._casts[value]
        copy = value.to(dtype)
        if isinstance(value, nn.Parameter):
            self.ledger.relabel(copy, CASTS)
            if value.requires_grad and self._casts is not None:
                self._casts[value] = copy
        return copy


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention in tiles, as a CPU or GPU does: no T x T matrix is materialized."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
