from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from ssmvl.errors import ShapeError
from ssmvl.interfaces import Grid
from ssmvl.testing import check_fusion
from ssmvl.vision.fusion import ChannelFusion, SequenceFusion

GRID = Grid(1, 2, 2)


def test_concatenates_channels_in_the_given_order() -> None:
    features = {"a": torch.randn(2, 4, 3), "b": torch.randn(2, 4, 5)}
    grids = {"a": GRID, "b": GRID}
    fusion = ChannelFusion({"a": 3, "b": 5}, grids, order=["b", "a"])
    assert (fusion.width, fusion.grid) == (8, GRID)
    assert torch.equal(fusion(features), torch.cat([features["b"], features["a"]], -1))
    assert torch.equal(ChannelFusion({"a": 3, "b": 5}, grids)(features), torch.cat([features["a"], features["b"]], -1))


FUSIONS = (ChannelFusion, SequenceFusion)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_unequal_grids_are_rejected_and_named(fusion: type[nn.Module]) -> None:
    with pytest.raises(ShapeError, match=r"a has \(1, 2, 2\), b has \(1, 3, 3\)"):
        fusion({"a": 3, "b": 5}, {"a": GRID, "b": Grid(1, 3, 3)})


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("order", [["a"], ["a", "a"], ["a", "c"]])
def test_an_invalid_order_is_rejected(fusion: type[nn.Module], order: list[str]) -> None:
    with pytest.raises(ShapeError, match="order must name each encoder once"):
        fusion({"a": 3, "b": 5}, {"a": GRID, "b": GRID}, order=order)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_satisfies_the_contract_of_fusions(fusion: type[nn.Module]) -> None:
    check_fusion(fusion)
    check_fusion(partial(fusion, order=["b", "a"]), widths={"a": 6, "b": 4})


@pytest.mark.parametrize("order", [None, ["c", "a", "b"]])
def test_sequence_projects_each_encoder_and_concatenates_the_maps(order: list[str] | None) -> None:
    widths, grid = {"a": 3, "b": 5, "c": 2}, Grid(1, 2, 3)
    fusion = SequenceFusion(widths, dict.fromkeys(widths, grid), order=order).double()
    features = {name: torch.randn(2, 6, width, dtype=torch.float64) for name, width in widths.items()}
    actual = fusion(features)
    assert fusion.width == 5
    assert fusion.grid == Grid(3, 2, 3)
    assert actual.shape == (2, fusion.grid.length, 5)
    state = fusion.state_dict()
    for number, name in enumerate(order or widths):
        weight, bias = state[f"projections.{name}.weight"], state[f"projections.{name}.bias"]
        for image in range(2):
            for patch in range(6):
                expected = weight @ features[name][image, patch] + bias
                torch.testing.assert_close(actual[image, number * 6 + patch], expected)


def test_sequence_has_one_weight_and_one_bias_per_encoder() -> None:
    fusion = SequenceFusion({"dino": 1024, "siglip": 1152}, dict.fromkeys(["dino", "siglip"], Grid(1, 27, 27)))
    assert fusion.grid.length == 1458
    assert sum(p.numel() for p in fusion.parameters()) == (1024 + 1) * 1152 + (1152 + 1) * 1152


def test_sequence_computes_in_the_dtype_of_its_weights() -> None:
    fusion = SequenceFusion({"a": 3, "b": 5}, {"a": GRID, "b": GRID}).to(torch.bfloat16)
    assert fusion({"a": torch.randn(1, 4, 3), "b": torch.randn(1, 4, 5)}).dtype == torch.bfloat16


def test_sequence_of_sequences_is_rejected() -> None:
    with pytest.raises(ShapeError, match=r"the encoders' \(2, 2, 2\) has 2"):
        SequenceFusion({"a": 3, "b": 5}, dict.fromkeys(["a", "b"], Grid(2, 2, 2)))
