"""Broken mixers that `check_mixer` must reject."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, Paths
from ssmvl.layers.mamba1 import Mamba1Mixer, Mamba1State
from ssmvl.scans import bsm
from ssmvl.testing import check_mixer


class Small(Mamba1Mixer):
    def __init__(self, width: int, num_paths: int) -> None:
        super().__init__(width, num_paths, d_state=4, dt_rank=2)


class PeeksAhead(Small):
    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, paths, segments) + 0.01 * x.roll(-1, 1)


class MixesRows(Small):
    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, paths, segments) - 0.01 * x.mean(0)


class IgnoresSegments(Small):
    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, paths)


class ReadsTheFirstRowsSegments(Small):
    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, paths, None if segments is None else segments[:1].expand(len(x), -1))


class ReadsOneWay(Small):
    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        return super().forward(
            x, None if paths is None else Paths.of(paths.order[:1].expand(len(paths.order), -1)), segments
        )


class IgnoresItsPaths(Small):
    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, Paths.of(bsm(Grid(1, 1, x.shape[1]))) if self.folding.count == 2 else paths, segments)


class ShiftsAlongPaths(Small):
    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, None if paths is None else Paths.of(paths.order.roll(1, 1)), segments)


class DropsAChannel(Small):
    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, paths, segments)[..., :-1]


class Overflows(Small):
    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, paths, segments) / 0


class ReturnsBf16(Small):
    def forward(self, x: Tensor, paths: Paths | None = None, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, paths, segments).bfloat16()


class ReadsPadding(Small):
    def prefill(self, x: Tensor, lengths: Tensor, state: Any) -> Tensor:
        return super().prefill(x, torch.full_like(lengths, x.shape[1]), state)


class ResetsItsState(Small):
    def prefill(self, x: Tensor, lengths: Tensor, state: Any) -> Tensor:
        for tensor in state:
            tensor.zero_()
        return super().prefill(x, lengths, state)


class StepForgets(Small):
    def step(self, x: Tensor, state: Any) -> Tensor:
        return super().step(x, Mamba1State(*(tensor.clone() for tensor in state)))


class StepKeepsAGraph(Small):
    def step(self, x: Tensor, state: Any) -> Tensor:
        return super().step(x, state) + 0 * self.D.sum()


class StateIsADict(Small):
    def new_state(self, rows: int, device: Any = None, dtype: Any = None) -> Any:
        return super().new_state(rows, device, dtype)._asdict()


class StateHasRowsLast(Small):
    def new_state(self, rows: int, device: Any = None, dtype: Any = None) -> Any:
        return Mamba1State(*(tensor.transpose(0, -1) for tensor in super().new_state(rows, device, dtype)))


class StateStaysOnTheCpu(Small):
    def new_state(self, rows: int, device: Any = None, dtype: Any = None) -> Any:
        return super().new_state(rows, "cpu", dtype)


class NeverUsesAParameter(Small):
    def __init__(self, width: int, num_paths: int) -> None:
        super().__init__(width, num_paths)
        self.unused = nn.Parameter(torch.zeros(1))


class ReadsItsWeights(Small):
    def __init__(self, width: int, num_paths: int) -> None:
        super().__init__(width, num_paths)
        self.largest = self.in_proj.weight.max().item()


class BuildsOnTheCpu(Small):
    def __init__(self, width: int, num_paths: int) -> None:
        super().__init__(width, num_paths)
        self.register_buffer("table", torch.zeros(3, device="cpu"))


def linear(width: int, num_paths: int) -> nn.Module:
    return nn.Linear(width, width)


def function(width: int, num_paths: int) -> Any:
    return torch.relu


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (
            PeeksAhead,
            r"PeeksAhead must be causal, but a change at position 1 .*; first difference at \[0, 0, 0\]: received",
        ),
        (MixesRows, "MixesRows must process each row independently, but row 0 depends on the others"),
        (IgnoresSegments, "IgnoresSegments: segment 1 of row 0 must give the same result alone and packed"),
        (ReadsTheFirstRowsSegments, "segment 0 of row 1 must give the same result|segment 1 of row 1"),
        (ReadsOneWay, "must read in both directions; a change at position 11 does not affect position 6"),
        (IgnoresItsPaths, "IgnoresItsPaths must follow `paths`"),
        (ShiftsAlongPaths, "over the single path of raster must equal the result without paths"),
        (DropsAChannel, r"must return torch.float32 \(3, 12, 8\), returned torch.float32 \(3, 12, 7\)"),
        (Overflows, "Overflows returns values that are not finite"),
        (ReturnsBf16, "returned torch.bfloat16"),
        (ReadsPadding, "ReadsPadding.step after prefill: row 1, of length 4 padded to 7"),
        (ResetsItsState, "ResetsItsState: a prefill split at position 1 must equal an unsplit one"),
        (StepForgets, "StepForgets.step after prefill: row 0"),
        (StepKeepsAGraph, "must not build an autograd graph"),
        (StateIsADict, r"new_state must return a named tuple of tensors \(3,\) on cpu, rows first; received dict"),
        (StateHasRowsLast, r"tensors \(3,\) on cpu, rows first; received \(16,\) on cpu, \(4,\) on cpu"),
        (StateStaysOnTheCpu, r"tensors \(3,\) on meta, rows first; received \(3,\) on cpu"),
        (NeverUsesAParameter, "NeverUsesAParameter: unused receives no finite gradient"),
        (ReadsItsWeights, "ReadsItsWeights cannot be built on `meta`"),
        (BuildsOnTheCpu, "table is on cpu after a build on `meta`"),
        (linear, "linear lacks new_state, prefill, step; see ssmvl.interfaces.Mixer"),
        (function, "function is a builtin_function_or_method, not a torch.nn.Module"),
    ],
)
def test_a_broken_mixer_is_rejected(mixer: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_mixer(mixer, width=8)


def test_the_unbroken_mixer_passes() -> None:
    check_mixer(Small, width=8)
