"""Configurations of causal LMs: options that transformers would silently ignore are errors."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from ssmvl_transformers.causal_lm import CausalLM

from ssmvl.errors import ContractError, MissingDependencyError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 23,
}
VICUNA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(config: dict[str, Any], num_tokens: int = 20) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(config=config, num_tokens=num_tokens)


def test_vicuna_7b_has_its_published_size() -> None:
    lm = build(VICUNA_7B, num_tokens=32000)
    assert sum(p.numel() for p in lm.parameters()) == 6_738_415_616
    assert (lm.width, lm.vocab_rows, len(lm.shard_units())) == (4096, 32000, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "lama"},
            r"is 'lama', an architecture that causal_lm was not tested .* Did you mean 'llama'\? Allowed: .*gpt_neox",
        ),
        ({"model_type": None}, "config.model_type is None, an architecture that causal_lm was not tested with"),
        ({"model_type": "doge"}, "config.model_type is 'doge', an architecture that causal_lm was not tested with"),
        (
            {"hiden_size": 16},
            r"llama has no option 'hiden_size'. Did you mean 'hidden_size'\? Allowed: .*vocab",
        ),
        ({"to_dict": 1}, "config of llama has no option 'to_dict'"),
        ({"auto_map": {"AutoModelForCausalLM": "a/b--c.D"}}, "config of llama has no option 'auto_map'"),
        ({"quantization_config": {"bits": 4}}, "config of llama has no option 'quantization_config'"),
        ({"hidden_size": "16"}, "config.hidden_size must have the type of 4096, received '16'"),
        ({"hidden_size": True}, "config.hidden_size must have the type of 4096, received True"),
        ({"rms_norm_eps": [1e-5]}, "config.rms_norm_eps must have the type of 1e-06, received"),
        ({"use_cache": 1}, "config.use_cache must have the type of True, received 1"),
        ({"hidden_act": 3}, "config.hidden_act must have the type of 'silu', received 3"),
        ({"hidden_act": "silo"}, "transformers cannot build a llama model: KeyError: .*silo"),
        ({"vocab_size": -1}, "transformers cannot build a llama model: RuntimeError"),
        ({"intermediate_size": None}, "transformers (cannot build a llama model|rejects the llama config): "),
        ({"vocab_size": 19}, "num_tokens is 20, but config.vocab_size is 19"),
        ({"logit_scale": 2.0}, "config of llama has no option 'logit_scale'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "llama cannot be a causal_lm: rope_type 'dynamic'"),
    ],
)
def test_a_mistake_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        build({**LLAMA, **changes})


def test_options_that_change_logits_are_rejected() -> None:
    with pytest.raises(
        ContractError, match=r"granite cannot be a causal_lm: config\.logits_scaling=2.* must be None or 1"
    ):
        build({**LLAMA, "model_type": "granite", "logits_scaling": 2.0})


def test_other_keys_of_a_config_file_are_accepted() -> None:
    extra = {
        "architectures": ["LlamaForCausalLM"],
        "transformers_version": "4.31.0",
        "_name_or_path": "x/y",
        "torch_dtype": "float16",
        "eos_token_id": [2, 3],
        "pad_token_id": None,
        "rope_theta": 10000,
        "rope_scaling": None,
        "attention_dropout": 0,
        "tie_word_embeddings": False,
    }
    lm = CausalLM(config={**LLAMA, **extra}, num_tokens=20)
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    with_dtype = CausalLM(config={**LLAMA, "dtype": "bfloat16"}, num_tokens=20)
    assert {p.dtype for p in with_dtype.parameters()} == {torch.float32}


def test_parameters_have_torchs_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        lm = CausalLM(config=LLAMA, num_tokens=20)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in lm.buffers()} == {torch.float32}


def test_the_recipes_options_are_not_modified() -> None:
    config = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}
    before = copy.deepcopy(config)
    build(config)
    assert config == before


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ssmvl\[transformers\]'"):
        build(LLAMA)
