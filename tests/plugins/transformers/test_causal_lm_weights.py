"""Loading weights written by transformers into a causal LM."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ssmvl_transformers.causal_lm import CausalLM
from ssmvl_transformers.causal_lm_layout import transformers_causal_lm

from ssmvl.checkpoints import open_checkpoint
from ssmvl.errors import CheckpointError
from ssmvl.model.loading import open_weights

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 23,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 23, "n_positions": 18},
    "opt": {
        "model_type": "opt",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 24,
        "vocab_size": 23,
        "word_embed_proj_dim": 8,
    },
    "falcon": {
        "model_type": "falcon",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 23,
    },
}


def make(seed: int, **config: Any) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(config=config, num_tokens=20).eval()


def load(lm: CausalLM, folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    layout = transformers_causal_lm(checkpoint.tensors.keys(), checkpoint.config)
    assert layout is not None
    assert layout.part == "language"
    layout.load(lm, checkpoint.tensors, checkpoint.source)


def assert_same(actual: CausalLM, expected: CausalLM) -> None:
    expected_state = expected.state_dict()
    assert expected_state
    assert all(tensor.equal(expected_state[name]) for name, tensor in actual.state_dict().items())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("shard", ["1GB", "3KB"])
def test_loads_files_saved_by_transformers(kind: str, shard: str, tmp_path: Path) -> None:
    written, lm = make(1, **CONFIGS[kind]), make(2, **CONFIGS[kind])
    written.model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "3KB")
    load(lm, tmp_path)
    assert_same(lm, written)
    assert len(list(lm.parameters())) == len(list(written.parameters()))


def older_file(folder: Path, kind: str, prefix: str, *tables: str) -> CausalLM:
    """Write a `pytorch_model.bin` with extra `tables` and names without `prefix`; return the model that wrote it."""
    written = make(1, **CONFIGS[kind])
    tensors = {name.removeprefix(prefix): tensor for name, tensor in written.model.state_dict().items()}
    torch.save(tensors | dict.fromkeys(tables, torch.ones(2)), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    return written


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        (
            "gpt_neox",
            [f"gpt_neox.layers.1.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")],
        ),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
    ],
)
def test_tables_in_older_files_are_ignored_and_weights_are_not(kind: str, tables: list[str], tmp_path: Path) -> None:
    written, lm = older_file(tmp_path, kind, "", *tables), make(2, **CONFIGS[kind])
    load(lm, tmp_path)
    assert_same(lm, written)
    weight = f"{tables[0].rpartition('.')[0]}.c_attn.bias"
    older_file(tmp_path, kind, "", weight)
    with pytest.raises(CheckpointError, match=re.escape(weight)):
        load(lm, tmp_path)


@pytest.mark.parametrize(
    ("kind", "prefix", "tables"),
    [("gpt2", "transformer.", ["h.0.attn.bias"]), ("tied", "model.", []), ("opt", "model.", [])],
)
def test_files_of_only_the_body(kind: str, prefix: str, tables: list[str], tmp_path: Path) -> None:
    """Such files, like gpt2 on the Hub, contain `wte.weight` and `h.0…` without `transformer.`."""
    written, lm = older_file(tmp_path, kind, prefix, *tables), make(2, **CONFIGS[kind])
    assert not any(name.startswith(prefix) for name in open_checkpoint(tmp_path).tensors)
    load(lm, tmp_path)
    assert_same(lm, written)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    written, lm = make(1, **CONFIGS["tied"]), make(2, **CONFIGS["tied"])
    written.model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in open_checkpoint(tmp_path).tensors
    load(lm, tmp_path)
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    torch.save(written.model.state_dict(), tmp_path / "pytorch_model.bin")  # torch saves both names
    (tmp_path / "model.safetensors").unlink()
    load(lm, tmp_path)
    assert_same(lm, written)


def test_an_untied_head_does_not_fit_a_tied_model_and_vice_versa(tmp_path: Path) -> None:
    make(1, **CONFIGS["llama"]).model.save_pretrained(tmp_path / "own")
    make(1, **CONFIGS["tied"]).model.save_pretrained(tmp_path / "tied")
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load(make(2, **CONFIGS["tied"]), tmp_path / "own")
    with pytest.raises(
        CheckpointError, match=r"missing model.lm_head.weight \(in the file: lm_head.weight\) \(23, 16\)"
    ):
        load(make(2, **CONFIGS["llama"]), tmp_path / "tied")


def test_a_head_may_have_another_name_in_the_file(tmp_path: Path) -> None:
    """GPT-NeoX's head is `embed_out` in files and in transformers 4, but `lm_head` in transformers 5."""
    written, lm = make(1, **CONFIGS["gpt_neox"]), make(2, **CONFIGS["gpt_neox"])
    heads = ("embed_out.weight", "lm_head.weight")
    for head in heads:
        tensors = {head if name in heads else name: t for name, t in written.model.state_dict().items()}
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt_neox"]))
        load(lm, tmp_path)
        assert_same(lm, written)


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-3}, {"rope_theta": 7.0}, {"num_attention_heads": 2}, {"hidden_act": "gelu"}]
)
def test_settings_that_shapes_do_not_reveal_must_match_the_recipe(change: dict[str, Any], tmp_path: Path) -> None:
    make(1, **CONFIGS["llama"]).model.save_pretrained(tmp_path)
    lm = make(2, **{**CONFIGS["llama"], **change})
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    (name,) = change
    name = "rope_" if name.startswith("rope") else name  # in rope_parameters in transformers 5
    with pytest.raises(CheckpointError, match=rf"model\.config\.{name}\w* is .*, the checkpoint needs"):
        load(lm, tmp_path)
    assert all(tensor.equal(before[name]) for name, tensor in lm.state_dict().items())


def test_settings_without_effect_may_differ(tmp_path: Path) -> None:
    written = make(1, **CONFIGS["llama"])
    written.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    without_effect = {
        "use_cache": False,
        "eos_token_id": 7,
        "max_position_embeddings": 9,
        "torch_dtype": "float16",
        "x": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, **without_effect}))
    lm = make(2, **CONFIGS["llama"])
    load(lm, tmp_path)
    assert_same(lm, written)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    make(1, **CONFIGS["llama"]).model.save_pretrained(tmp_path)
    lm = make(2, **{**CONFIGS["llama"], "model_type": "qwen3"})
    with pytest.raises(CheckpointError, match=r"model.config.model_type is 'qwen3', the .* needs 'llama'"):
        load(lm, tmp_path)


@pytest.mark.parametrize("config", [None, {}, {"hidden_size": 16}])
def test_a_file_without_its_config_is_rejected(config: dict[str, Any] | None, tmp_path: Path) -> None:
    make(1, **CONFIGS["llama"]).model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    missing = r"(is missing or empty|lacks model_type), .*copy config\.json from"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: its config\.json {missing}"):
        open_weights(tmp_path, "language")


def test_the_padding_index_of_xglm_must_match(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "num_layers": 1, "attention_heads": 4, "ffn_dim": 24, "vocab_size": 23}
    make(1, model_type="xglm", **sizes).model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.config\.pad_token_id is 5, the checkpoint needs 1"):
        load(make(2, model_type="xglm", **sizes, pad_token_id=5), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": ["llama"]}, r"model_type is 'llama', the checkpoint needs \['llama'\]"),
        ({"model_type": None}, "model_type is 'llama', the checkpoint needs None"),
        ({"hidden_size": "16"}, r"rejects its llama config\.json \(TypeError"),
        ({"intermediate_size": "24"}, "intermediate_size is 24, the checkpoint needs '24'"),
        ({"rope_scaling": 3}, "rope_scaling is None, the checkpoint needs 3|rejects its llama config"),
        ({"torch_dtype": "float5"}, r"model\.safetensors: transformers rejects its llama config\.json \("),
        ({"id2label": 3}, r"model\.safetensors: transformers rejects its llama config\.json \("),
    ],
)
def test_a_bad_value_in_a_files_config(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    make(1, **CONFIGS["llama"]).model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["llama"], **change}))
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path, "language").load(make(2, **CONFIGS["llama"]))


@pytest.mark.parametrize(
    "names",
    [
        ["backbone.embeddings.weight", "backbone.layers.0.mixer.in_proj.weight", "lm_head.weight"],
        ["blocks.0.attn.qkv.weight", "cls_token", "norm.weight"],
        ["vit.encoder.layer.0.attention.attention.query.weight", "vit.embeddings.cls_token", "classifier.weight"],
        ["visual.transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"],
        ["language.model.model.embed_tokens.weight", "encoders.a.blocks.0.attn.qkv.weight", "connector.stem.0.weight"],
        [
            "model.llm_backbone.llm.model.embed_tokens.weight",
            "model.llm_backbone.llm.model.layers.0.self_attn.q.weight",
        ],
        ["shared.weight", "decoder.embed_tokens.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
        [],
    ],
)
def test_files_in_other_layouts_are_not_recognized(names: list[str]) -> None:
    assert transformers_causal_lm(names, {}) is None
