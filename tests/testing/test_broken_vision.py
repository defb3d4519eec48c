"""Broken components that `check_encoder`, `check_fusion` and `check_connector` must reject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmvl.connectors.projectors import MlpConnector
from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, ImageSpec
from ssmvl.testing import check_connector, check_encoder, check_fusion
from ssmvl.vision.fusion import ChannelFusion


class Patches(nn.Module):
    """Four patches of 8 x 8 pixels."""

    width, grid, image_spec = 5, Grid(1, 2, 2), ImageSpec(8)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.linear(F.unfold(pixels / 255, 4, stride=4).transpose(1, 2))

    weights = "none"

    def unused(self) -> None:
        pass

    def shard_units(self) -> Sequence[nn.Module]:
        return [self]


class DropsAPatch(Patches):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels)[:, 1:]


class NeedsAnImage(Patches):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels) if len(pixels) else torch.zeros(0)


class MixesImages(Patches):
    def forward(self, pixels: Tensor) -> Tensor:
        features = super().forward(pixels)
        return features - 0.1 * features.mean(0)


class IgnoresPixels(Patches):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(0 * pixels)


class HasNoGrid(Patches):
    grid = (1, 2, 2)


class HasNoWidth(Patches):
    width = "5"


class HasNoSpec(Patches):
    image_spec = 8


class ShardsAnotherModule(Patches):
    def shard_units(self) -> Sequence[nn.Module]:
        return [Patches()]


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (DropsAPatch, r"must return torch.float32 \(3, 4, 5\), returned torch.float32 \(3, 3, 5\)"),
        (NeedsAnImage, r"of zero images must return torch.float32 \(0, 4, 5\), returned torch.float32 \(0,\)"),
        (MixesImages, "MixesImages must process each row independently"),
        (IgnoresPixels, "IgnoresPixels returns the same features for two different images"),
        (HasNoGrid, r"HasNoGrid.grid must be a Grid\(maps, rows, columns\), is \(1, 2, 2\)"),
        (HasNoWidth, "HasNoWidth.width must be a positive integer, is '5'"),
        (HasNoSpec, "HasNoSpec.image_spec must be an ImageSpec, is 8"),
        (ShardsAnotherModule, "ShardsAnotherModule.shard_units returns a Patches that is not one of its modules"),
        (partial(nn.Linear, 3, 4), "Linear lacks grid, image_spec, shard_units, weights, width"),
    ],
)
def test_a_broken_encoder_is_rejected(encoder: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_encoder(encoder)


class FusesByPosition(ChannelFusion):
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return torch.cat(list(features.values()), dim=-1)


class DropsAnEncoder(ChannelFusion):
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return features[self.order[0]]


class DetachesOne(ChannelFusion):
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return super().forward({**features, self.order[1]: features[self.order[1]].detach()})


class MixesFusedImages(ChannelFusion):
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        fused = super().forward(features)
        return fused - 0.1 * fused.mean(0)


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        (FusesByPosition, "FusesByPosition must select features by the encoders' names"),
        (
            DropsAnEncoder,
            r"DropsAnEncoder must return torch.float32 \(3, 16, 16\), returned torch.float32 \(3, 16, 6\)",
        ),
        (DetachesOne, "DetachesOne: second receives no finite gradient"),
        (MixesFusedImages, "MixesFusedImages must process each row independently"),
    ],
)
def test_a_broken_fusion_is_rejected(fusion: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_fusion(fusion)


class HasATable(MlpConnector):
    def __init__(self, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__(in_width, out_width, grid)
        self.register_buffer("table", torch.zeros(grid.length))


class RegistersATable(MlpConnector):
    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        self.register_buffer("made", torch.zeros(grid.length))
        return super().forward(x, grid)


class HalvesItsTokenCount(MlpConnector):
    def num_tokens(self, grid: Grid) -> int:
        return grid.length // 2


class RemembersOneGrid(MlpConnector):
    def __init__(self, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__(in_width, out_width, grid)
        self.tokens = grid.length

    def num_tokens(self, grid: Grid) -> int:
        return self.tokens


class MixesTokens(MlpConnector):
    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        tokens = super().forward(x, grid)
        return tokens - 0.1 * tokens.mean(0)


class StopsGradients(MlpConnector):
    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return super().forward(x.detach(), grid)


class NeverUsesAParameter(MlpConnector):
    def __init__(self, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__(in_width, out_width, grid)
        self.unused = nn.Parameter(torch.zeros(1))


class ReadsItsWeights(MlpConnector):
    def __init__(self, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__(in_width, out_width, grid)
        self.positive = bool(self.projector[0].bias.sum() > 0)


class ShardsALinear(MlpConnector):
    def shard_units(self) -> Sequence[nn.Module]:
        return [nn.Linear(1, 1)]


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        (HasATable, r"may depend on the grid; table is \(24,\) for \(1, 4, 6\), \(16,\) for \(1, 4, 4\)"),
        (RegistersATable, r"may depend on the grid; made is \(16,\) for \(1, 4, 6\), None for \(1, 4, 4\)"),
        (
            HalvesItsTokenCount,
            r"over grid \(1, 4, 6\) must return torch.float32 \(3, 12, 64\), returned torch.float32 \(3, 24, 64\)",
        ),
        (RemembersOneGrid, r"over grid \(1, 4, 4\) must return torch.float32 \(3, 24, 64\)"),
        (MixesTokens, "must process each row independently, but row 0 depends on the others"),
        (StopsGradients, "its input receives no finite gradient"),
        (NeverUsesAParameter, "unused receives no finite gradient"),
        (ReadsItsWeights, "ReadsItsWeights cannot be built on `meta`"),
        (ShardsALinear, "shard_units returns a Linear that is not one of its modules"),
    ],
)
def test_a_broken_connector_is_rejected(connector: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_connector(connector)


def test_the_unbroken_components_pass() -> None:
    check_encoder(Patches)
    check_fusion(partial(ChannelFusion, order=["b", "name"]), widths={"name": 3, "b": 4})
    check_connector(MlpConnector, in_width=3, out_width=5, grids=(Grid(1, 1, 2), Grid(2, 3, 1)))
