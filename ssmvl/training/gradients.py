"""Gradient clipping that keeps the norm, and norms and finiteness of parameters, sharded or not."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from composer import Event, Logger, State
from composer.algorithms import GradientClipping as ComposerClipping
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class GradientClipping(ComposerClipping):
    """Clip the global norm of the gradients, and keep the norm before clipping as `norm`.

    Checkpoints name algorithms by class, so it keeps the name of Composer's.

    Args:
        limit: largest norm; None computes the norm and clips nothing.
    """

    norm: Tensor | float = 0.0

    def __init__(self, limit: float | None) -> None:
        super().__init__("norm", math.inf if limit is None else limit)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip after the backward of a step."""
        if event == Event.AFTER_TRAIN_BATCH:
            norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), self.clipping_threshold)
            self.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all tensors together, over all ranks that hold shards of them."""
    norm = torch.nn.utils.get_total_norm(list(tensors))
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """Check that every parameter is finite, on every rank; collective: all ranks must call it."""
    own = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    finite = torch.stack([part.isfinite().all() for part in own]).all().int()
    dist.all_reduce(finite, reduce_operation="MIN")
    return bool(finite)
