"""Where an op leaves the precision that surrounds it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off for `device`, where it is on."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def backward_without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `backward` of an autograd Function: autocast is off in it, and it has no gradient of its own."""

    @once_differentiable
    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor | None) -> Any:
        device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
        with without_autocast(device):
            return backward(ctx, *grads)

    return run
