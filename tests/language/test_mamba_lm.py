from __future__ import annotations

import functools

import pytest
import torch

from ssmvl.language.mamba_lm import MambaLM
from ssmvl.layers.mamba2 import Mamba2Mixer


@pytest.fixture
def lm() -> MambaLM:
    return MambaLM(width=8, num_layers=2, num_tokens=20, mixer=functools.partial(Mamba2Mixer, d_state=4, head_dim=4))


def test_vocabulary_is_padded_and_the_head_is_the_embedding(lm: MambaLM) -> None:
    assert (lm.num_tokens, lm.vocab_rows) == (20, 32)
    hidden = torch.randn(3, 8)
    torch.testing.assert_close(lm.head(hidden), hidden @ lm.embedding.weight.T)
    assert sum("32" in str(tuple(p.shape)) for p in lm.parameters()) == 1


@pytest.mark.parametrize("cut", range(0, 71, 7))
def test_prefill_in_parts_equals_backbone(lm: MambaLM, cut: int) -> None:
    with torch.no_grad():
        embeds = lm.embed(torch.randint(20, (2, 70)))
        state = lm.new_state(2)
        first = lm.prefill(embeds[:, :cut], torch.full((2,), cut), state)
        second = lm.prefill(embeds[:, cut:], torch.full((2,), 70 - cut), state)
        torch.testing.assert_close(torch.cat([first, second], 1), lm.backbone(embeds), atol=1e-5, rtol=1e-4)


def test_steps_equal_backbone(lm: MambaLM) -> None:
    with torch.no_grad():
        embeds = lm.embed(torch.randint(20, (2, 9)))
        state = lm.new_state(2)
        steps = [lm.step(embeds[:, t], state) for t in range(9)]
        torch.testing.assert_close(torch.stack(steps, 1), lm.backbone(embeds), atol=1e-5, rtol=1e-4)


def test_shard_units_leave_the_tied_embedding_out(lm: MambaLM) -> None:
    inside = {id(p) for unit in lm.shard_units() for p in unit.parameters()}
    assert id(lm.embedding.weight) not in inside
    assert len(lm.shard_units()) == 2
