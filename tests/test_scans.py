from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, Paths
from ssmvl.ops.reorder import along, path_table
from ssmvl.plugins import components
from ssmvl.scans import bsm, csm, raster
from ssmvl.testing import check_scan_order

grids = st.builds(Grid, st.integers(1, 2), st.integers(1, 7), st.integers(1, 7))


def test_golden_paths() -> None:
    grid = Grid(1, 2, 3)
    assert raster(grid).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert bsm(grid).tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    assert csm(grid).tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0]]


@pytest.mark.parametrize("name", ["raster", "bsm", "csm"])
def test_satisfies_the_contract(name: str) -> None:
    check_scan_order(components().find("scan_order", name).load())


def test_orders_that_violate_the_contract_are_rejected() -> None:
    with pytest.raises(ContractError, match="must not depend on the grid"):
        check_scan_order(lambda grid: raster(grid).expand(1 + grid.rows % 2, -1))
    with pytest.raises(ContractError, match="on the second call"):
        check_scan_order(lambda grid: torch.randperm(grid.length)[None])


@pytest.mark.parametrize("name", ["raster", "bsm", "csm"])
def test_every_order_returns_permutations_with_inverses(name: str) -> None:
    order = components().find("scan_order", name).load()

    @given(grids)
    def check(grid: Grid) -> None:
        paths = path_table(order, grid)
        x = torch.arange(grid.length).reshape(1, -1, 1, 1).expand(2, -1, len(paths), 3)
        assert torch.equal(along(along(x, paths), Paths.of(paths).inverse), x)
        assert torch.equal(along(x, paths)[0, :, :, 0], paths.t())

    check()


def test_paths_have_values_in_a_meta_context() -> None:
    with torch.device("meta"):
        paths = path_table(csm, Grid(1, 2, 2))
    assert paths.tolist() == csm(Grid(1, 2, 2)).tolist()


def test_paths_made_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        paths = path_table(bsm, Grid(1, 1, 3))
    x = torch.randn(1, 3, 2, 4, requires_grad=True)
    along(x, paths).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            torch.tensor([[0, 1, 2], [0, 2, 2]]),
            "'broken' over grid .1, 1, 3.: path 1 .* position 2 holds index 2 again",
        ),
        (torch.tensor([[0, 1, 3]]), "path 0 .* position 2 holds index 3, outside 0…2"),
        (torch.tensor([[0, 1]]), r"must return paths \(K, 3\), returned \(1, 2\)"),
        (torch.tensor([0, 1, 2]), r"returned \(3,\)"),
        (torch.tensor([[0.0, 1.0, 2.0]]), "int64 indices, returned torch.float32"),
        ([[0, 1, 2]], "returned list"),
    ],
)
def test_an_order_that_is_not_a_permutation_is_rejected(table: torch.Tensor, message: str) -> None:
    def broken(grid: Grid) -> torch.Tensor:
        return table

    with pytest.raises(ContractError, match=message):
        path_table(broken, Grid(1, 1, 3))
