"""All supported architectures of `causal_lm`: independent rows, causality, tied heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ssmvl_transformers.causal_lm import CausalLM
from ssmvl_transformers.configuration import TESTED

from ssmvl.errors import CheckpointError
from ssmvl.model.loading import open_weights

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 23,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 23, "n_positions": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gpt_neox", "olmo", "olmo2", "persimmon", "phi", "granite"), SIZES),
    **dict.fromkeys(("exaone4", "llama", "qwen2"), GROUPED),
    **{key: {**GROUPED, "sliding_window": 3} for key in ("mistral", "starcoder2")},
    **{key: {**GROUPED, "pad_token_id": 0} for key in ("phi3", "smollm3")},
    "stablelm": {**SIZES, "num_key_value_heads": 4},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen2_moe": {**GROUPED, "num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    **{key: {**GROUPED, "head_dim": 4} for key in ("gemma", "qwen3")},
    "gemma3_text": {**GROUPED, "head_dim": 4, "sliding_window": 3},
    "glm": {**GROUPED, "head_dim": 4, "pad_token_id": 0},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 2},
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 23,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 3,
    },
    "opt": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 23},
    "xglm": {
        "d_model": 16,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 24,
        "vocab_size": 23,
        "max_position_embeddings": 64,
    },
}
CONFIGS["opt"] = {key: value for key, value in CONFIGS["opt"].items() if key != "intermediate_size"}


def test_every_supported_architecture_is_tested() -> None:
    assert sorted(CONFIGS) == sorted(TESTED)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_rows_are_independent_and_causal(kind: str) -> None:
    lm = CausalLM(config={"model_type": kind, **CONFIGS[kind]}, num_tokens=20).eval()
    for parameter in lm.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    x, lengths = torch.randn(3, 12, lm.width), [5, 2, 7]
    logits = lm.head(lm.backbone(x))
    changed = torch.cat([x[:, :7], torch.randn(3, 5, lm.width)], 1)
    tolerances = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(lm.head(lm.backbone(changed))[:, :7], logits[:, :7], **tolerances)
    for row, expected in zip(x, logits, strict=True):
        alone = lm.model(inputs_embeds=row[None], use_cache=False).logits[0]
        torch.testing.assert_close(alone, expected, **tolerances)
    state = lm.new_state(3)
    prefilled = lm.head(lm.prefill(x[:, :7], torch.tensor(lengths), state))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(prefilled[row, :length], logits[row, :length], **tolerances)
    for t in range(4):
        index = torch.arange(3), torch.tensor(lengths) + t
        torch.testing.assert_close(lm.head(lm.step(x[index], state)), logits[index], **tolerances)
    assert logits.std() > 0.1


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_head_that_contradicts_a_tied_config_is_rejected(kind: str, tmp_path: Path) -> None:
    """transformers would replace the file's head by the embedding; an untied model would load it."""
    config = {"model_type": kind, **CONFIGS[kind]}
    model = CausalLM(config={**config, "tie_word_embeddings": True}, num_tokens=20).model
    untied = CausalLM(config={**config, "tie_word_embeddings": False}, num_tokens=20)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({**tensors, f"{head}.weight": tensors[f"{head}.weight"] + 1}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    with pytest.raises(CheckpointError, match=rf"{head}\.weight differs from .*, but config\.json ties them"):
        open_weights(tmp_path, "language").load(untied)
