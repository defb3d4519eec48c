"""Autograd functions of the ops: the precision of their backward, and an error for second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ssmvl.errors import BackendError


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context with autocast disabled for `device`."""
    enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def backward_without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `backward` of an autograd Function: autocast is off inside, and differentiating it raises an error.

    torch's `once_differentiable` does not attach its error to any input. Autograd prunes it and returns only what other
    paths contribute, a wrong second derivative. Here the error is on every path from the gradients to the inputs that
    the Function saved, so the Function must save every input that its gradients depend on.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
        with torch.no_grad(), without_autocast(device):
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        inputs = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad]
        if not inputs:
            return results
        tensors = [grad for grad in results if grad is not None]
        linked = iter(_NoSecondDerivative.apply(len(tensors), *tensors, *inputs))
        return tuple(None if grad is None else next(linked) for grad in results)

    return run


def differentiable_once(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Attach an error for second derivatives to the inputs of an op whose own backward is not differentiable."""
    needed = [t for t in tensors if t is not None and t.requires_grad]
    if not (needed and torch.is_grad_enabled()):
        return tensors
    # Empty copies are part of the tensors' graph but hold none of their memory.
    marked = iter(_Once.apply(len(needed), *needed, *(t.reshape(-1)[:0].clone() for t in needed)))
    return tuple(next(marked) if t is not None and t.requires_grad else t for t in tensors)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads, *([None] * len(ctx.saved_tensors))


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise BackendError(
            "ssmvl's scans, convolutions and norms of large inputs have no second derivative; gradient penalties, MAML "
            "and Hessian-vector products cannot be computed through them"
        )
