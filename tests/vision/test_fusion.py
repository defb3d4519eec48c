from __future__ import annotations

import pytest
import torch

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Grid
from ssmvl.vision.fusion import ChannelFusion

GRID = Grid(1, 2, 2)


def test_joins_channels_in_the_given_order() -> None:
    features = {"a": torch.randn(2, 4, 3), "b": torch.randn(2, 4, 5)}
    grids = {"a": GRID, "b": GRID}
    fusion = ChannelFusion({"a": 3, "b": 5}, grids, order=["b", "a"])
    assert (fusion.width, fusion.grid) == (8, GRID)
    assert torch.equal(fusion(features), torch.cat([features["b"], features["a"]], -1))
    assert torch.equal(ChannelFusion({"a": 3, "b": 5}, grids)(features), torch.cat([features["a"], features["b"]], -1))


def test_unequal_grids_are_refused_with_both() -> None:
    with pytest.raises(ShapeError, match=r"a has \(1, 2, 2\), b has \(1, 3, 3\)"):
        ChannelFusion({"a": 3, "b": 5}, {"a": GRID, "b": Grid(1, 3, 3)})


@pytest.mark.parametrize("order", [["a"], ["a", "a"], ["a", "c"]])
def test_an_order_that_is_none_is_refused(order: list[str]) -> None:
    with pytest.raises(ShapeError, match="order must name each encoder once"):
        ChannelFusion({"a": 3, "b": 5}, {"a": GRID, "b": GRID}, order=order)
