"""K scan paths as one sequence op: the tables of a scan order, and folding of paths into channels or rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Grid, Paths, ScanOrder
from ssmvl.ops.reorder import along, path_table

__all__ = ["PathFolding", "PathParameters", "PathTables"]

CPU = torch.device("cpu")
PathParameters = Literal["own", "shared"]


class PathTables:
    """Paths of a scan order, evaluated once per grid; not part of the state dict.

    Args:
        order: grid -> paths.
        grid: the grid that the model is built for.

    Attributes:
        count: K, which must not depend on the grid.

    Raises:
        ContractError: the order does not return permutations of the grid.
    """

    def __init__(self, order: ScanOrder, grid: Grid) -> None:
        self.order, self.grid = order, grid
        self._tables: dict[tuple[Grid, torch.device], Paths] = {}
        self.count = len(self(grid, CPU).order)

    def __call__(self, grid: Grid, device: torch.device) -> Paths:
        """The paths over a grid, on `device`.

        Raises:
            ContractError: the order does not return permutations of the grid.
        """
        key = (grid, device)
        if key not in self._tables:
            with torch.inference_mode(False):  # a copy made in inference mode cannot be trained with
                if device == CPU:
                    self._tables[key] = Paths.of(path_table(self.order, grid))
                else:
                    self._tables[key] = Paths(*(table.to(device) for table in self(grid, CPU)))
        return self._tables[key]


class PathFolding:
    """Folding of a mixer's paths: into the channels if each has its own parameters, into the rows if they share them.

    Args:
        count: K; 1 for a causal mixer without paths.
        parameters: whether each path has its `own` parameters, or all paths have `shared` ones.
        merge: how the K results, back in raster order, are combined.

    Raises:
        ShapeError: `parameters` or `merge` has a value that is not allowed.
    """

    def __init__(self, count: int, parameters: PathParameters, merge: Literal["mean", "sum"]) -> None:
        for name, value, allowed in (
            ("path_parameters", parameters, ("own", "shared")),
            ("merge", merge, ("mean", "sum")),
        ):
            if value not in allowed:
                raise ShapeError(f"{name} must be {' or '.join(map(repr, allowed))}, received {value!r}")
        self.count, self.merge_by = count, merge
        self.own = count if parameters == "own" else 1  # number of parameter sets

    def check(self, length: int, paths: Paths | None, segments: Tensor | None) -> None:
        """Check the arguments of a mixer's `forward`.

        Raises:
            ShapeError: `paths` does not hold K paths of L positions, or is combined with segments.
        """
        if (1 if paths is None else len(paths.order)) != self.count:
            got = "no" if paths is None else str(len(paths.order))
            raise ShapeError(f"a mixer built for num_paths={self.count} received {got} paths")
        if paths is not None and paths.order.shape[1:] != (length,):
            shape = tuple(paths.order.shape)
            raise ShapeError(f"paths must have shape ({self.count}, {length}) for this input, received {shape}")
        if paths is not None and segments is not None:
            raise ShapeError(
                "paths and segments are mutually exclusive: a path runs over one grid, not over packed samples"
            )

    def check_causal(self) -> None:
        """Check that there is only one path; a mixer over several paths has no state.

        Raises:
            ShapeError: there are several.
        """
        if self.count != 1:
            raise ShapeError(
                f"a mixer over {self.count} paths has no state; build it with num_paths=1 to decode with it"
            )

    def fold(self, x: Tensor, paths: Paths | None) -> Tensor:
        """X (B, L, C) -> (B, L, K*C), or (B*K, L, C) if the parameters are shared; each path in its order."""
        if paths is None:
            return x
        read = along(x[:, :, None].expand(-1, -1, self.count, -1), paths.order)
        return read.flatten(2) if self.own == self.count else read.transpose(1, 2).flatten(0, 1)

    def unfold(self, y: Tensor, paths: Paths | None) -> Tensor:
        """Y, the result for a folded x -> (B, L, K, C), in raster order."""
        if self.own == self.count:
            y = y.unflatten(2, (self.count, y.shape[2] // self.count))
        else:
            y = y.unflatten(0, (-1, self.count)).transpose(1, 2)
        return y if paths is None else along(y, paths.inverse)

    def merge(self, y: Tensor) -> Tensor:
        """Y (B, L, K, C) -> (B, L, C)."""
        if self.count == 1:
            return y.squeeze(2)
        return y.mean(2) if self.merge_by == "mean" else y.sum(2)
