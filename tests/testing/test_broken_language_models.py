"""What `check_language_model` finds, in recurrent models and in others."""

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


class ForgetsSegments(Small):
    def backbone(self, embeds: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().backbone(embeds)


class GivesNoLogits(Small):
    def head(self, hidden: Tensor) -> Tensor:
        return hidden


class NormsOverPositions(Small):
    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden).softmax(-2)


class ShardsItself(Small):
    def shard_units(self) -> Sequence[nn.Module]:
        return [self]


class ShardsAStranger(Small):
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


class Remembered:
    """All embeddings of each row: a state that grows and cannot be overwritten."""

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.seen)

    def rows(self, index: Sequence[int]) -> Remembered:
        return Remembered([self.seen[row] for row in index])

    def clone(self) -> Remembered:
        return Remembered(list(self.seen))

    def write(self, index: Sequence[int], other: Remembered) -> None:
        raise NotImplementedError


class Averages(nn.Module):
    """The mean of all that came before: a language model that is not recurrent."""

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

    def prefill(self, embeds: Tensor, lengths: Tensor, state: Remembered) -> Tensor:
        hidden = torch.zeros_like(embeds)
        for row, length in enumerate(lengths.tolist()):
            state.seen[row] = torch.cat([state.seen[row], embeds[row, :length]])
            if length:  # a row that has ended comes with nothing left
                hidden[row, :length] = self.backbone(state.seen[row][None])[0, -length:]
        return hidden

    def step(self, embeds: Tensor, state: Remembered) -> Tensor:
        return self.prefill(embeds[:, None], torch.ones(len(embeds), dtype=torch.long), state)[:, 0]

    def new_state(self, rows: int, device: Any = None, dtype: Any = None) -> Remembered:
        return Remembered([torch.zeros(0, 8)] * rows)

    def shard_units(self) -> Sequence[nn.Module]:
        return []


class AveragesAnew(Averages):
    def prefill(self, embeds: Tensor, lengths: Tensor, state: Remembered) -> Tensor:
        state.seen = [torch.zeros(0, 8)] * len(embeds)
        return super().prefill(embeds, lengths, state)


class ClaimsToBeRecurrent(Averages):
    recurrent = True


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (HasTooFewRows, "needs a row of the vocabulary; num_tokens is 33, vocab_rows is 32"),
        (ReadsBackwards, "ReadsBackwards must be causal"),
        (ForgetsSegments, "ForgetsSegments: segment 1 of row 0 must be as it is alone"),
        (GivesNoLogits, r"GivesNoLogits.head must give torch.float32 \(3, 12, 32\), gave torch.float32 \(3, 12, 8\)"),
        (NormsOverPositions, "NormsOverPositions.head must treat each position alone"),
        (ShardsItself, "ShardsItself.shard_units holds embedding.weight, of the embedding or the head"),
        (ShardsAStranger, "shard_units names a Linear that is no module of it"),
        (HoldsStates, "rows and clones must be copies"),
        (HoldsUnwritableStates, r"state.write\(\[1\], …\) must set row 1 only"),
        (HoldsSortedStates, r"state.rows\(\[2, 0\]\) must hold these rows"),
        (HoldsMiscountedStates, "the same fixed size: 1 bytes at first, 1 after a prefill, 1 of 2 rows of 3"),
        (HoldsLists, "the state of HoldsLists lacks clone, nbytes, rows, write; see ssmvl.interfaces.State"),
        (AveragesAnew, "AveragesAnew.step after prefill|AveragesAnew: a prefill cut at position 1 must be as one"),
        (ClaimsToBeRecurrent, "ClaimsToBeRecurrent: segment 1 of row 0"),
    ],
)
def test_a_broken_language_model_is_refused(model: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_language_model(model)


@pytest.mark.parametrize("model", [Small, Averages])
def test_the_models_that_they_are_made_of_are_not(model: Any) -> None:
    check_language_model(model)
