"""Broken language models, recurrent or not, that `check_language_model` must reject."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmvl.errors import ContractError
from ssmvl.language.mamba_lm import MambaLM
from ssmvl.language.state import RecurrentState
from ssmvl.layers.mamba2 import Mamba2Mixer
from ssmvl.testing import check_language_model


class Small(MambaLM):
    def __init__(self) -> None:
        mixer = partial(Mamba2Mixer, d_state=4, head_dim=4)
        super().__init__(width=8, num_layers=1, num_tokens=20, mixer=mixer)


class HasTooFewRows(Small):
    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 33


class ReadsBackwards(Small):
    def backbone(self, embeds: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().backbone(embeds.flip(1), segments).flip(1)


class IgnoresSegments(Small):
    def backbone(self, embeds: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().backbone(embeds)


class ReturnsHiddenStates(Small):
    def head(self, hidden: Tensor) -> Tensor:
        return hidden


class NormalizesOverPositions(Small):
    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden).softmax(-2)


class ShardsItself(Small):
    def shard_units(self) -> Sequence[nn.Module]:
        return [self]


class ShardsAnotherModule(Small):
    def shard_units(self) -> Sequence[nn.Module]:
        return [nn.Linear(1, 1)]


class SharedState(RecurrentState):
    def clone(self) -> Any:
        return self


class UnwritableState(RecurrentState):
    def write(self, index: Any, other: Any) -> None:
        pass


class SortedState(RecurrentState):
    def rows(self, index: Any) -> Any:
        return super().rows(sorted(index))


class HoldsStates(Small):
    state: Any = SharedState

    def new_state(self, rows: int, device: Any = None, dtype: Any = None) -> Any:
        return self.state(self._name, super().new_state(rows, device, dtype).layers)


class HoldsUnwritableStates(HoldsStates):
    state = UnwritableState


class HoldsSortedStates(HoldsStates):
    state = SortedState


class MiscountedState(RecurrentState):
    nbytes = 1


class HoldsMiscountedStates(HoldsStates):
    state = MiscountedState


class HoldsLists(HoldsStates):
    state = staticmethod(lambda name, layers: layers)


class GrowingState:
    """All embeddings of each row: a state that grows and cannot be overwritten."""

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.seen)

    def rows(self, index: Sequence[int]) -> GrowingState:
        return GrowingState([self.seen[row] for row in index])

    def clone(self) -> GrowingState:
        return GrowingState(list(self.seen))

    def write(self, index: Sequence[int], other: GrowingState) -> None:
        raise NotImplementedError


class Averages(nn.Module):
    """A language model that is not recurrent: the mean of all positions so far."""

    width, vocab_rows, num_tokens, recurrent, weights = 8, 16, 16, False, "none"

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embedding.weight.T

    def backbone(self, embeds: Tensor, segments: Tensor | None = None) -> Tensor:
        return embeds.cumsum(1) / torch.arange(1, embeds.shape[1] + 1)[:, None]

    def prefill(self, embeds: Tensor, lengths: Tensor, state: GrowingState) -> Tensor:
        hidden = torch.zeros_like(embeds)
        for row, length in enumerate(lengths.tolist()):
            state.seen[row] = torch.cat([state.seen[row], embeds[row, :length]])
            if length:  # 0 for a row that has ended
                hidden[row, :length] = self.backbone(state.seen[row][None])[0, -length:]
        return hidden

    def step(self, embeds: Tensor, state: GrowingState) -> Tensor:
        return self.prefill(embeds[:, None], torch.ones(len(embeds), dtype=torch.long), state)[:, 0]

    def new_state(self, rows: int, device: Any = None, dtype: Any = None) -> GrowingState:
        return GrowingState([torch.zeros(0, 8)] * rows)

    def shard_units(self) -> Sequence[nn.Module]:
        return []


class ResetsItsState(Averages):
    def prefill(self, embeds: Tensor, lengths: Tensor, state: GrowingState) -> Tensor:
        state.seen = [torch.zeros(0, 8)] * len(embeds)
        return super().prefill(embeds, lengths, state)


class ClaimsToBeRecurrent(Averages):
    recurrent = True


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (HasTooFewRows, "needs a row of the vocabulary; num_tokens is 33, vocab_rows is 32"),
        (ReadsBackwards, "ReadsBackwards must be causal"),
        (IgnoresSegments, "IgnoresSegments: segment 1 of row 0 must give the same result alone and packed"),
        (
            ReturnsHiddenStates,
            r"head must return torch.float32 \(3, 12, 32\), returned torch.float32 \(3, 12, 8\)",
        ),
        (NormalizesOverPositions, "NormalizesOverPositions.head must process each position independently"),
        (
            ShardsItself,
            "ShardsItself.shard_units must not contain embedding.weight, a parameter of the embedding or the head",
        ),
        (ShardsAnotherModule, "shard_units returns a Linear that is not one of its modules"),
        (HoldsStates, r"rows\(\) and clone\(\) must return copies"),
        (HoldsUnwritableStates, r"state.write\(\[1\], …\) must set only row 1"),
        (HoldsSortedStates, r"state.rows\(\[2, 0\]\) must contain these rows in this order"),
        (
            HoldsMiscountedStates,
            "the same fixed size, received 1 bytes at first, 1 after a prefill, 1 for 2 of 3 rows",
        ),
        (HoldsLists, "the state of HoldsLists lacks clone, nbytes, rows, write; see ssmvl.interfaces.State"),
        (ResetsItsState, "ResetsItsState.step after prefill|ResetsItsState: a prefill split at position 1 must equal"),
        (ClaimsToBeRecurrent, "ClaimsToBeRecurrent: segment 1 of row 0"),
    ],
)
def test_a_broken_language_model_is_rejected(model: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_language_model(model)


@pytest.mark.parametrize("model", [Small, Averages])
def test_the_unbroken_models_pass(model: Any) -> None:
    check_language_model(model)
