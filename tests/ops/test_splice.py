from __future__ import annotations

import pytest
import torch

from ssmvl.errors import ShapeError
from ssmvl.ops.splice import splice


def test_copies_to_the_positions_only() -> None:
    embeds, visual = torch.randn(2, 5, 3), torch.randn(2, 2, 3)
    spliced = splice(embeds, visual, torch.tensor([1, 2, 5, 9]))
    assert torch.equal(spliced.flatten(0, 1)[[1, 2, 5, 9]], visual.flatten(0, 1))
    rest = [0, 3, 4, 6, 7, 8]
    assert torch.equal(spliced.flatten(0, 1)[rest], embeds.flatten(0, 1)[rest])


def test_gradients_reach_both() -> None:
    embeds = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    visual = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: splice(a, b, torch.tensor([0, 3])), (embeds, visual))


def test_casts_to_the_embeddings() -> None:
    assert splice(torch.zeros(1, 2, 3), torch.ones(1, 1, 3).bfloat16(), torch.tensor([1])).dtype == torch.float32


def test_counts_that_differ_are_rejected() -> None:
    with pytest.raises(ShapeError, match="2 images of 2 visual tokens do not fill 3 image places"):
        splice(torch.zeros(1, 9, 3), torch.zeros(2, 2, 3), torch.tensor([0, 1, 2]))
