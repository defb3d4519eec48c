"""Both language models: whole sequences, parts, steps, padded and packed rows."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssmvl.errors import ContractError, ShapeError
from ssmvl.language.mamba_lm import Mamba1LM, MambaLM
from ssmvl.language.state import RecurrentState
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.mamba2 import Mamba2Mixer

assert_close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)


def assert_states_close(actual: RecurrentState, expected: RecurrentState) -> None:
    for layer, other in zip(actual.layers, expected.layers, strict=True):
        for a, b in zip(layer, other, strict=True):
            assert_close(a, b)


def full(rows: int, length: int) -> Tensor:
    return torch.full((rows,), length)


def started(lm: MambaLM, rows: int) -> RecurrentState:
    """A state after 5 positions, different in each row."""
    state = lm.new_state(rows)
    lm.prefill(torch.randn(rows, 5, 8), full(rows, 5), state)
    return state


def test_vocabulary_is_padded_and_the_head_is_the_embedding(lm: MambaLM) -> None:
    rows = 24 if isinstance(lm, Mamba1LM) else 32
    assert (lm.num_tokens, lm.vocab_rows) == (20, rows)
    hidden = torch.randn(3, 8)
    assert_close(lm.head(hidden), hidden @ lm.embedding.weight.T)
    assert [name for name, p in lm.named_parameters() if p.shape == (rows, 8)] == ["embedding.weight"]


def test_each_model_has_its_default_mixer() -> None:
    sizes = {"width": 64, "num_layers": 1, "num_tokens": 4}
    assert isinstance(MambaLM(**sizes).layers[0].mixer, Mamba2Mixer)
    assert isinstance(Mamba1LM(**sizes).layers[0].mixer, Mamba1Mixer)


@pytest.mark.parametrize(("language", "parameters"), [(MambaLM, 2_702_599_680), (Mamba1LM, 2_768_345_600)])
def test_published_sizes(language: type[MambaLM], parameters: int) -> None:
    with torch.device("meta"):
        model = language(width=2560, num_layers=64, num_tokens=50277)
    assert sum(p.numel() for p in model.parameters()) == parameters


@torch.no_grad()
def test_prefill_equals_backbone(lm: MambaLM) -> None:
    embeds = lm.embed(torch.randint(20, (2, 70)))
    assert_close(lm.prefill(embeds, full(2, 70), lm.new_state(2)), lm.backbone(embeds))


@pytest.mark.parametrize("cut", range(71))
@torch.no_grad()
def test_prefill_in_two_parts_equals_prefill(lm: MambaLM, cut: int) -> None:
    embeds = lm.embed(torch.randint(20, (2, 70)))
    whole, parts = lm.new_state(2), lm.new_state(2)
    expected = lm.prefill(embeds, full(2, 70), whole)
    first = lm.prefill(embeds[:, :cut], full(2, cut), parts)
    second = lm.prefill(embeds[:, cut:], full(2, 70 - cut), parts)
    assert_close(torch.cat([first, second], 1), expected)
    assert_states_close(parts, whole)


@torch.no_grad()
def test_steps_equal_prefill(lm: MambaLM) -> None:
    embeds = lm.embed(torch.randint(20, (2, 70)))
    whole, stepped = lm.new_state(2), lm.new_state(2)
    expected = lm.prefill(embeds, full(2, 70), whole)
    steps = [lm.step(embeds[:, t], stepped) for t in range(70)]
    assert_close(torch.stack(steps, 1), expected)
    assert_states_close(stepped, whole)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5))
@torch.no_grad()
def test_rows_of_any_lengths_equal_the_row_alone(lm: MambaLM, lengths: list[int]) -> None:
    embeds, together = torch.randn(len(lengths), 20, 8), started(lm, len(lengths))
    alone = [together.rows([row]) for row in range(len(lengths))]
    hidden = lm.prefill(embeds, torch.tensor(lengths), together)
    for row, length in enumerate(lengths):
        expected = lm.prefill(embeds[row : row + 1, :length], full(1, length), alone[row])
        assert_close(hidden[row : row + 1, :length], expected)
        assert_states_close(together.rows([row]), alone[row])


@pytest.mark.parametrize("lengths", [[21, 21], [24, 16], [20, 0], [3, 8], [1, 17]])
@torch.no_grad()
def test_a_prefill_in_chunks_equals_one_pass(lm: MambaLM, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    embeds, whole = torch.randn(2, 24, 8), started(lm, 2)
    chunked = whole.clone()
    expected = lm.prefill(embeds, torch.tensor(lengths), whole)
    monkeypatch.setattr("ssmvl.language.mamba_lm.PREFILL_CHUNK", 8)
    hidden = lm.prefill(embeds, torch.tensor(lengths), chunked)
    assert hidden.shape == expected.shape
    for row, length in enumerate(lengths):
        assert_close(hidden[row, :length], expected[row, :length])
    assert_states_close(chunked, whole)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 3))
def test_packed_row_equals_separate_samples_forward_and_backward(lm: MambaLM, lengths: list[int], padding: int) -> None:
    real = sum(lengths)
    embeds, weight = torch.randn(1, real + padding, 8, requires_grad=True), torch.randn(1, real, 8)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    segments = torch.cat([numbers, torch.full((padding,), -1)])[None].int()
    packed = lm.backbone(embeds, segments)[:, :real]
    separate = torch.cat([lm.backbone(part) for part in embeds[:, :real].split(lengths, dim=1)], 1)
    assert_close(packed, separate)
    inputs = [embeds, *(p for name, p in lm.named_parameters() if name != "embedding.weight")]
    gradients = (torch.autograd.grad((y * weight).sum(), inputs) for y in (packed, separate))
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, atol=1e-4 * max(1.0, float(other.abs().max())))


def assert_rejected(lm: MambaLM, rows: int, state: RecurrentState, message: str, length: int = 4) -> None:
    for run in (
        lambda: lm.prefill(torch.randn(rows, length, 8), full(rows, length), state),
        lambda: lm.step(torch.randn(rows, 8), state),
    ):
        with pytest.raises(ShapeError, match=message) as caught, torch.no_grad():
            run()
        assert "\n" not in str(caught.value)


def test_state_of_another_model_is_rejected(lm: MambaLM) -> None:
    mixer = type(lm.layers[0].mixer).__name__
    deeper = type(lm)(width=64, num_layers=3, num_tokens=20)
    assert_rejected(
        lm, 2, deeper.new_state(2), f"state of {mixer} LM, width 64, 3 layers, .* cannot .* {mixer} LM, width 8, 2"
    )
    other = MambaLM if isinstance(lm, Mamba1LM) else Mamba1LM
    assert_rejected(lm, 2, other(width=64, num_layers=1, num_tokens=20).new_state(2), rf"cannot be used by {mixer} LM")


def test_state_of_another_size_is_rejected(lm: MambaLM) -> None:
    mixer = functools.partial(
        type(lm.layers[0].mixer), d_state=6, **({} if isinstance(lm, Mamba1LM) else {"head_dim": 4})
    )
    larger = type(lm)(width=8, num_layers=2, num_tokens=20, mixer=mixer)
    assert_rejected(lm, 2, larger.new_state(2), "cannot be used by")


def test_state_with_another_number_of_rows_is_rejected(lm: MambaLM) -> None:
    assert_rejected(lm, 2, lm.new_state(3), r"a state of 3 rows cannot be used for 2; make one with new_state\(2\)")


def test_a_batch_of_no_rows_is_rejected(lm: MambaLM) -> None:
    assert_rejected(lm, 0, lm.new_state(0), "the batch has no rows")
    assert_rejected(lm, 0, lm.new_state(0), "the batch has no rows", length=0)
    with pytest.raises(ShapeError, match="the batch has no rows"):
        lm.backbone(torch.randn(0, 4, 8))


@pytest.mark.parametrize("lengths", [[4, 5], [4, -1], [4]])
def test_lengths_that_do_not_fit_are_rejected(lm: MambaLM, lengths: list[int]) -> None:
    with pytest.raises(
        ShapeError, match=r"lengths\[1\] must be in 0…4, received (5|-1)|lengths must have shape \(2,\)"
    ):
        lm.prefill(torch.randn(2, 4, 8), torch.tensor(lengths), lm.new_state(2))


def test_shard_units_exclude_the_tied_embedding(lm: MambaLM) -> None:
    inside = {id(p) for unit in lm.shard_units() for p in unit.parameters()}
    assert id(lm.embedding.weight) not in inside
    assert len(lm.shard_units()) == 2


def test_state_of_another_dtype_is_rejected(lm: MambaLM) -> None:
    assert_rejected(
        lm, 2, lm.new_state(2, dtype=torch.bfloat16), "needs a state in torch.float32 on cpu, received one in torch.bf"
    )


def test_the_step_is_one_graph(lm: MambaLM) -> None:
    """torch.compile needs one graph; here it is run without a compiler."""
    step = torch.compile(lm.step, backend="eager", fullgraph=True, dynamic=False)
    state, embeds = lm.new_state(2), torch.randn(2, lm.width)
    expected = lm.step(embeds, other := state.clone())
    assert torch.equal(step(embeds, state), expected)
    for layer, expected_layer in zip(state.layers, other.layers, strict=True):
        assert all(map(torch.equal, layer, expected_layer))


@pytest.mark.parametrize("missing", ["prefill", "step", "new_state"])
def test_a_mixer_that_cannot_decode_is_rejected_when_it_is_built(missing: str) -> None:
    """Its model would train, and fail at the first answer."""

    def mixer(width: int, num_paths: int) -> nn.Module:
        module = Mamba2Mixer(width, num_paths, d_state=8, head_dim=8)
        setattr(module, missing, None)
        return module

    with pytest.raises(ContractError, match=f"the mixer Mamba2Mixer lacks {missing}, which a language model needs"):
        MambaLM(width=16, num_layers=1, num_tokens=20, mixer=mixer)
