"""What `check_encoder`, `check_fusion` and `check_connector` find."""

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


class LosesAPatch(Patches):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels)[:, 1:]


class NeedsAnImage(Patches):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels) if len(pixels) else torch.zeros(0)


class ComparesImages(Patches):
    def forward(self, pixels: Tensor) -> Tensor:
        features = super().forward(pixels)
        return features - 0.1 * features.mean(0)


class SeesNothing(Patches):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(0 * pixels)


class HasNoGrid(Patches):
    grid = (1, 2, 2)


class HasNoWidth(Patches):
    width = "5"


class HasNoSpec(Patches):
    image_spec = 8


class ShardsAStranger(Patches):
    def shard_units(self) -> Sequence[nn.Module]:
        return [Patches()]


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (LosesAPatch, r"must give torch.float32 \(3, 4, 5\), gave torch.float32 \(3, 3, 5\)"),
        (NeedsAnImage, r"NeedsAnImage of no image must give torch.float32 \(0, 4, 5\), gave torch.float32 \(0,\)"),
        (ComparesImages, "ComparesImages must treat each row alone"),
        (SeesNothing, "SeesNothing gives the same features for two different images"),
        (HasNoGrid, r"HasNoGrid.grid must be a Grid\(maps, rows, columns\), is \(1, 2, 2\)"),
        (HasNoWidth, "HasNoWidth.width must be a count, is '5'"),
        (HasNoSpec, "HasNoSpec.image_spec must be an ImageSpec, is 8"),
        (ShardsAStranger, "ShardsAStranger.shard_units names a Patches that is no module of it"),
        (partial(nn.Linear, 3, 4), "Linear lacks grid, image_spec, shard_units, weights, width"),
    ],
)
def test_a_broken_encoder_is_refused(encoder: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_encoder(encoder)


class GoesByPosition(ChannelFusion):
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return torch.cat(list(features.values()), dim=-1)


class LosesAWidth(ChannelFusion):
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return features[self.order[0]]


class FreezesOne(ChannelFusion):
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return super().forward({**features, self.order[1]: features[self.order[1]].detach()})


class ComparesImagesToo(ChannelFusion):
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        fused = super().forward(features)
        return fused - 0.1 * fused.mean(0)


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        (GoesByPosition, "GoesByPosition must go by the encoders' names"),
        (LosesAWidth, r"LosesAWidth must give torch.float32 \(3, 16, 16\), gave torch.float32 \(3, 16, 6\)"),
        (FreezesOne, "FreezesOne: second receives no finite gradient"),
        (ComparesImagesToo, "ComparesImagesToo must treat each row alone"),
    ],
)
def test_a_broken_fusion_is_refused(fusion: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_fusion(fusion)


class HasATable(MlpConnector):
    def __init__(self, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__(in_width, out_width, grid)
        self.register_buffer("table", torch.zeros(grid.length))


class MakesATable(MlpConnector):
    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        self.register_buffer("made", torch.zeros(grid.length))
        return super().forward(x, grid)


class CountsHalf(MlpConnector):
    def num_tokens(self, grid: Grid) -> int:
        return grid.length // 2


class KnowsOneGrid(MlpConnector):
    def __init__(self, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__(in_width, out_width, grid)
        self.tokens = grid.length

    def num_tokens(self, grid: Grid) -> int:
        return self.tokens


class ComparesTokens(MlpConnector):
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


class LooksAtItsWeights(MlpConnector):
    def __init__(self, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__(in_width, out_width, grid)
        self.positive = bool(self.projector[0].bias.sum() > 0)


class NamesAStranger(MlpConnector):
    def shard_units(self) -> Sequence[nn.Module]:
        return [nn.Linear(1, 1)]


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        (HasATable, r"may depend on the grid; table is \(24,\) for \(1, 4, 6\), \(16,\) for \(1, 4, 4\)"),
        (MakesATable, r"may depend on the grid; made is \(16,\) for \(1, 4, 6\), None for \(1, 4, 4\)"),
        (CountsHalf, r"over grid \(1, 4, 6\) must give torch.float32 \(3, 12, 64\), gave torch.float32 \(3, 24, 64\)"),
        (KnowsOneGrid, r"over grid \(1, 4, 4\) must give torch.float32 \(3, 24, 64\)"),
        (ComparesTokens, "must treat each row alone, row 0 depends on the others"),
        (StopsGradients, "its input receives no finite gradient"),
        (NeverUsesAParameter, "unused receives no finite gradient"),
        (LooksAtItsWeights, "LooksAtItsWeights cannot be built on `meta`"),
        (NamesAStranger, "shard_units names a Linear that is no module of it"),
    ],
)
def test_a_broken_connector_is_refused(connector: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_connector(connector)


def test_what_they_are_made_of_is_not_refused() -> None:
    check_encoder(Patches)
    check_fusion(partial(ChannelFusion, order=["b", "name"]), widths={"name": 3, "b": 4})
    check_connector(MlpConnector, in_width=3, out_width=5, grids=(Grid(1, 1, 2), Grid(2, 3, 1)))
