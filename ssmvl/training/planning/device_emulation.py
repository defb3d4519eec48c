"""What a GPU or a CPU does and `meta` does not: autocast, attention in tiles, tiles of a size for the cache."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssmvl.training.planning.memory_ledger import CASTS, Ledger

# What autocast runs in bf16, and what in fp32, as far as models here call it.
LOWER = {
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.mm, torch.baddbmm, torch.addmm, torch.einsum),
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.multi_head_attention_forward),
}
FULL = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax}
IS_CPU = cast(Any, Tensor.is_cpu).__get__


class Device(TorchFunctionMode):
    """What a GPU under bf16 autocast, or a CPU in fp32, does otherwise than `meta`.

    Autocast acts where gradients are enabled: ops with a backward of their own leave it, and they alone disable them.
    """

    def __init__(self, gpu: bool, ledger: Ledger) -> None:
        super().__init__()
        self._gpu, self.ledger = gpu, ledger
        self._casts: dict[Tensor, Tensor] | None = {}

    def leave_forward(self) -> None:
        """Autocast's copies of weights go; backward makes no lasting ones."""
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

    def _cast(self, given: Any, dtype: torch.dtype) -> Any:
        if isinstance(given, tuple | list):
            return type(given)(self._cast(one, dtype) for one in given)
        if isinstance(given, dict):
            return {key: self._cast(one, dtype) for key, one in given.items()}
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.dtype == dtype:
            return given
        if self._casts is not None and given in self._casts:
            return self._casts[given]
        cast_ = given.to(dtype)
        if isinstance(given, nn.Parameter):
            self.ledger.call(cast_, CASTS)
            if given.requires_grad and self._casts is not None:
                self._casts[given] = cast_
        return cast_


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
    """In tiles, as a CPU and a GPU compute it: nothing of T x T is made."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return run(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
