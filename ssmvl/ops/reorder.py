"""Apply scan orders: evaluate and check the paths over a grid, and reorder tensors along them and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmvl.errors import ContractError, foreign
from ssmvl.interfaces import Grid, ScanOrder

__all__ = ["path_table", "along"]


def path_table(order: ScanOrder, grid: Grid) -> Tensor:
    """Evaluate a scan order over `grid` and check its paths: (K, L) int64 on the CPU, each a permutation of range(L).

    Raises:
        ContractError: the order raises an error or returns anything else. Names the order and the first wrong position.
    """
    name = str(order) if not hasattr(order, "__name__") else f"scan order {order.__name__!r}"
    where = f"{name} over grid {tuple(grid)}"
    try:
        # On meta, torch.arange would have no values. Tensors created in inference mode cannot be saved for backward.
        with torch.device("cpu"), torch.inference_mode(False):
            table = order(grid=grid)
    except Exception as error:  # a third-party order may raise anything
        raise ContractError(f"{where} fails: {foreign(error)}") from error
    if not isinstance(table, Tensor) or table.ndim != 2 or table.shape[1] != grid.length:
        got = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise ContractError(f"{where} must return paths (K, {grid.length}), returned {got}")
    if table.dtype != torch.int64:
        raise ContractError(f"{where} must return int64 indices, returned {table.dtype}")
    wrong = table.sort(dim=1).values != torch.arange(grid.length, device="cpu")
    if wrong.any():
        path = int(wrong.any(dim=1).nonzero()[0])
        seen: set[int] = set()
        for position, index in enumerate(table[path].tolist()):
            if index in seen or not 0 <= index < grid.length:
                why = " again" if index in seen else f", outside 0…{grid.length - 1}"
                raise ContractError(
                    f"{where}: path {path} is not a permutation: position {position} holds index {index}{why}"
                )
            seen.add(index)
    return table


def along(x: Tensor, order: Tensor) -> Tensor:
    """Gather x (B, L, K, *) along L, path k by the indices `order[k]` (L,). `Paths.inverse` restores raster order."""
    index = order.t().reshape(1, *order.t().shape, *[1] * (x.ndim - 3)).expand(x.shape)
    return x.gather(1, index)
