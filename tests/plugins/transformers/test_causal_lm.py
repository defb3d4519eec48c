"""`CausalLM` compared with transformers, which reads each row alone, without padding or cache."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from ssmvl_transformers.causal_lm import CausalLM
from ssmvl_transformers.state import KeyValueState
from torch import Tensor
from torch.nn import functional as F

from ssmvl.errors import ContractError, ShapeError
from ssmvl.interfaces import LanguageModel, State
from ssmvl.testing import check_language_model

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 23,
    "max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "num_key_value_heads": 2},
    "tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES, "rotary_pct": 0.5},
    "sliding": {"model_type": "mistral", **SIZES, "num_key_value_heads": 4, "sliding_window": 3},
    "learned_positions": {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 23,
        "n_positions": 18,
    },
    "adds_to_positions": {
        "model_type": "xglm",
        "d_model": 16,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 24,
        "vocab_size": 23,
        "max_position_embeddings": 18,
    },
}


def make(kind: str) -> CausalLM:
    torch.manual_seed(0)
    lm = CausalLM(config=CONFIGS[kind], num_tokens=20).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return lm if kind == "adds_to_positions" else lm.double()  # xglm's mask overflows in fp64


@pytest.fixture(scope="module", params=CONFIGS)
def lm(request: pytest.FixtureRequest) -> CausalLM:
    return make(request.param)


@pytest.fixture(scope="module")
def llama() -> CausalLM:
    return make("llama")


def embeds(lm: CausalLM, *shape: int) -> Tensor:
    return torch.randn(*shape, lm.width, dtype=lm.embed(torch.tensor([[0]])).dtype)


@torch.no_grad()
def alone(lm: CausalLM, row: Tensor) -> Tensor:
    """Transformers' logits (T, V) of one row (T, D)."""
    return lm.model(inputs_embeds=row[None], use_cache=False, return_dict=True).logits[0]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def read(lm: CausalLM, state: KeyValueState, x: Tensor, counts: list[int], length: int) -> list[Tensor]:
    """Prefill the next `counts` positions of each row of x, padded to `length` with NaN; return their logits."""
    starts = state.lengths.tolist()
    padded = torch.full_like(x[:, :length], torch.nan)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        padded[row, :count] = x[row, start : start + count]
    hidden = lm.prefill(padded, torch.tensor(counts), state)
    return [lm.head(row[:count]) for row, count in zip(hidden, counts, strict=True)]


def step(lm: CausalLM, state: KeyValueState, x: Tensor) -> list[Tensor]:
    logits = lm.head(lm.step(x[torch.arange(len(x)), state.lengths], state))
    return list(logits[:, None])


@pytest.mark.parametrize("length", [7, 11])
def test_rows_do_not_depend_on_padding_or_chunking(lm: CausalLM, length: int) -> None:
    x = embeds(lm, 3, 18)
    state = lm.new_state(3)
    parts = [read(lm, state, x, [5, 2, 7], length)]
    parts += [step(lm, state, x)]
    parts += [read(lm, state, x, [3, 6, 0], length)]
    parts += [step(lm, state, x), step(lm, state, x)]
    parts += [read(lm, state, x, [7, 1, 0], length)]  # only the first row reaches position 18
    lengths = [18, 12, 10]
    assert state.lengths.tolist() == lengths
    for row, count in enumerate(lengths):
        assert_near(torch.cat([part[row] for part in parts]), alone(lm, x[row, :count]))


def test_a_row_may_start_in_a_later_prefill(lm: CausalLM) -> None:
    x = embeds(lm, 2, 9)
    state = lm.new_state(2)
    parts = [read(lm, state, x, [4, 0], 4), read(lm, state, x, [1, 5], 5), step(lm, state, x)]
    for row, count in enumerate((6, 6)):
        assert_near(torch.cat([part[row] for part in parts]), alone(lm, x[row, :count]))


@pytest.mark.parametrize("cut", range(8))
def test_a_split_prefill_equals_an_unsplit_one(lm: CausalLM, cut: int) -> None:
    x = embeds(lm, 2, 8)
    state = lm.new_state(2)
    parts = [
        lm.prefill(part, torch.full((2,), part.shape[1]), state) for part in (x[:, :cut], x[:, cut:]) if part.shape[1]
    ]
    assert_near(lm.head(torch.cat(parts, dim=1)), torch.stack([alone(lm, row) for row in x]))


def test_steps_equal_the_backbone(lm: CausalLM) -> None:
    x = embeds(lm, 2, 6)
    state = lm.new_state(2)
    stepped = torch.stack([lm.step(x[:, position], state) for position in range(6)], dim=1)
    assert_near(stepped, lm.backbone(x).detach())


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt_neox", "sliding"])
def test_gradients_equal_those_of_transformers(kind: str) -> None:
    lm = make(kind)
    ids = torch.randint(20, (2, 7))
    logits = lm.head(lm.backbone(lm.embed(ids)))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in lm.model.named_parameters()}
    lm.zero_grad()
    lm.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in lm.model.named_parameters():
        assert parameter.grad is not None
        assert gradients[name] is not None
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-7, rtol=1e-6)  # transformers' loss is fp32


def test_training_rows_do_not_see_their_padding(llama: CausalLM) -> None:
    x = embeds(llama, 2, 9)
    logits = llama.head(llama.backbone(x)).detach()
    for row, length in enumerate((4, 9)):
        assert_near(logits[row, :length], alone(llama, x[row, :length]))


def test_training_uses_causal_attention_without_a_mask(llama: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = F.scaled_dot_product_attention, []

    def recorded(*args: Any, **options: Any) -> Tensor:
        calls.append((options["attn_mask"], options["is_causal"]))
        return plain(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    llama.backbone(embeds(llama, 2, 5))
    assert calls == [(None, True)] * 2


@pytest.mark.parametrize("kind", CONFIGS)
def test_satisfies_the_contract(kind: str) -> None:
    make_lm = functools.partial(CausalLM, config=CONFIGS[kind], num_tokens=20)
    check_language_model(make_lm)
    lm = make_lm(weights="some/model")
    assert isinstance(lm, LanguageModel)
    assert (lm.width, lm.vocab_rows, lm.num_tokens, lm.recurrent, lm.weights) == (16, 23, 20, False, "some/model")
    assert [type(unit).__name__ for unit in lm.shard_units()] == [type(lm.shard_units()[0]).__name__] * 2


def test_prefill_and_step_build_no_graph(llama: CausalLM) -> None:
    x, state = embeds(llama, 1, 3).requires_grad_(), llama.new_state(1)
    assert not llama.prefill(x, torch.tensor([3]), state).requires_grad
    assert not llama.step(x[:, 0], state).requires_grad


def test_a_state_counts_its_bytes(llama: CausalLM) -> None:
    state = llama.new_state(3)
    assert isinstance(state, State)
    assert state.nbytes == 3 * 8
    read(llama, state, embeds(llama, 3, 5), [5, 1, 2], 5)
    slots, heads, width = 5, 2, 4
    assert state.nbytes == 3 * 8 + 2 * 2 * (3 * heads * slots * width) * 8
    step(llama, state, embeds(llama, 3, 6))
    assert state.nbytes == 3 * 8 + 2 * 2 * (3 * heads * (slots + 1) * width) * 8


@pytest.mark.parametrize(
    ("index", "rows"),
    [([2, 0, 2], [2, 0, 2]), (torch.tensor([1]), [1]), (torch.tensor(2), [2]), ([True, False, True], [0, 2])],
)
def test_rows_of_a_state_are_copies(lm: CausalLM, index: Any, rows: list[int]) -> None:
    x, state = embeds(lm, 3, 9), lm.new_state(3)
    read(lm, state, x, [4, 1, 3], 6)
    chosen = state.rows(index)
    assert chosen.lengths.tolist() == [[4, 1, 3][row] for row in rows]
    for row, logits in zip(rows, step(lm, chosen, x[rows]), strict=True):
        assert_near(logits, alone(lm, x[row, : [4, 1, 3][row] + 1])[-1:])
    assert state.lengths.tolist() == [4, 1, 3]
    twin = state.clone()
    step(lm, state, x + 1)
    for row, logits in enumerate(step(lm, twin, x)):
        assert_near(logits, alone(lm, x[row, : [4, 1, 3][row] + 1])[-1:])


def test_misuse_of_a_state_raises_an_error(llama: CausalLM) -> None:
    state, x = llama.new_state(2), embeds(llama, 2, 3)
    with pytest.raises(ShapeError, match=r"cannot be overwritten \(recurrent is False\); select rows with rows\(\)"):
        state.write([0], llama.new_state(1))
    with pytest.raises(ShapeError, match="rows must be selected by a list of integers or a mask"):
        state.rows([0.5])
    with pytest.raises(ShapeError, match=r"a state of 2 rows cannot take 1; make one with new_state\(1\)"):
        llama.step(x[:1, 0], state)
    with pytest.raises(ShapeError, match="needs a state on cpu, received one on meta"):
        llama.step(x[:, 0], llama.new_state(2, "meta"))
    with pytest.raises(ShapeError, match=r"a state of causal LM llama, .* cannot be used by causal LM gpt_neox"):
        make("gpt_neox").step(x[:, 0], state)
    with pytest.raises(ShapeError, match=r"prefill: lengths\[1\] must be in 0…3, received 4"):
        llama.prefill(x, torch.tensor([3, 4]), state)


def test_segments_are_rejected(llama: CausalLM) -> None:
    with pytest.raises(ShapeError, match="reads padded rows, not packed ones"):
        llama.backbone(embeds(llama, 1, 4), torch.zeros(1, 4, dtype=torch.int32))


def test_a_model_that_ignores_the_cache_is_detected(llama: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    body = llama.model.model
    monkeypatch.setattr(body, "forward", lambda **given: type(body).forward(body, inputs_embeds=given["inputs_embeds"]))
    with pytest.raises(ContractError, match="does not store its keys and values in the cache"):
        llama.prefill(embeds(llama, 1, 2), torch.tensor([2]), llama.new_state(1))


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt_neox", "sliding"])
def test_meta_gives_shapes_without_values(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a value, which would synchronize with a device, raises an error on `meta`."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # torch lacks one for meta
    with torch.device("meta"):
        lm = CausalLM(config=CONFIGS[kind], num_tokens=20)
        assert {t.device.type for t in (*lm.parameters(), *lm.buffers())} == {"meta"}
        x = lm.embed(torch.zeros(2, 5, dtype=torch.long))
        assert lm.head(lm.backbone(x)).shape == (2, 5, 23)
        state = lm.new_state(2)
        for _ in range(2):
            hidden = lm.prefill(x, torch.zeros(2, dtype=torch.long), state)
        assert (hidden.shape, state.slots) == ((2, 5, 16), 10)


@pytest.mark.long
def test_the_first_model_of_a_process_may_be_on_meta() -> None:
    config = CONFIGS["llama"]
    code = (
        "import sys, torch\n"
        "from ssmvl_transformers.causal_lm import CausalLM\n"
        "before = 'transformers' in sys.modules\n"
        "with torch.device('meta'):\n"
        f"    lm = CausalLM(config={config!r}, num_tokens=20)\n"
        "print(before, next(lm.parameters()).device)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False meta\n"


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_rotary_frequencies_keep_their_precision_in_another_dtype(kind: str) -> None:
    lm = CausalLM(config=CONFIGS[kind], num_tokens=20)
    before = {name: buffer.clone() for name, buffer in lm.named_buffers()}
    assert before
    half = lm.to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert all(buffer.equal(before[name]) for name, buffer in half.named_buffers())
    assert half.backbone(half.embed(torch.zeros(1, 3, dtype=torch.long))).dtype == torch.bfloat16


def test_a_model_built_on_meta_can_be_materialized() -> None:
    """Ranks other than the first do so before they receive parameters and buffers."""
    with torch.device("meta"):
        lm = CausalLM(config=CONFIGS["llama"], num_tokens=20)
    lm.to_empty(device="cpu")
    assert {t.device.type for t in (*lm.parameters(), *lm.buffers())} == {"cpu"}
