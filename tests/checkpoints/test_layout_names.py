"""Names and shapes of published checkpoints, written by hand at full size, against the recipes' models on `meta`."""

from __future__ import annotations

import json
from functools import cache, partial

import pytest
import torch

import ssmvl
from ssmvl.plugins import components

Shapes = dict[str, tuple[int, ...]]
WIDTH, INNER, LAYERS, FEATURES = 2560, 5120, 64, 1024 + 1152
HEADS, STATE = 80, 128
CHANNELS = INNER + 2 * STATE
OF_A_PATH: Shapes = {
    "conv1d.weight": (CHANNELS, 1, 4),
    "conv1d.bias": (CHANNELS,),
    "dt_bias": (HEADS,),
    "A_log": (HEADS,),
    "D": (HEADS,),
}
MAMBA2: Shapes = {
    **OF_A_PATH,
    "in_proj.weight": (INNER + CHANNELS + HEADS, WIDTH),
    "norm.weight": (INNER,),
    "out_proj.weight": (WIDTH, INNER),
}
MAMBA1: Shapes = {
    "in_proj.weight": (2 * INNER, WIDTH),
    "conv1d.weight": (INNER, 1, 4),
    "conv1d.bias": (INNER,),
    "x_proj.weight": (160 + 2 * 16, INNER),
    "dt_proj.weight": (INNER, 160),
    "dt_proj.bias": (INNER,),
    "A_log": (INNER, 16),
    "D": (INNER,),
    "out_proj.weight": (WIDTH, INNER),
}
BACKWARD = {
    "conv1d.weight": "conv1d_b.weight",
    "conv1d.bias": "conv1d_b.bias",
    "dt_bias": "dt_bias_b",
    "A_log": "A_log_b",
    "D": "D_b",
}


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def linear(name: str, inside: int, outside: int) -> Shapes:
    return {f"{name}.weight": (outside, inside), f"{name}.bias": (outside,)}


def mamba(mixer: Shapes, rows: int, embedding: str = "embedding") -> Shapes:
    shapes: Shapes = {f"backbone.{embedding}.weight": (rows, WIDTH), "lm_head.weight": (rows, WIDTH)}
    for i in range(LAYERS):
        shapes |= under(f"backbone.layers.{i}.", {"norm.weight": (WIDTH,), **under("mixer.", mixer)})
    return {**shapes, "backbone.norm_f.weight": (WIDTH,)}


def fused_mlp(inside: int) -> Shapes:
    sizes = {0: (inside, 4 * inside), 2: (4 * inside, WIDTH), 4: (WIDTH, WIDTH)}
    return {
        name: shape
        for i, size in sizes.items()
        for name, shape in linear(f"model.projector.projector.{i}", *size).items()
    }


def ml_mamba(prefix: str) -> Shapes:
    norm: Shapes = {"weight": (WIDTH,), "bias": (WIDTH,)}
    scan = under("norm_f.", norm)
    for i in range(2):
        mixer = {**MAMBA2, **{BACKWARD[name]: shape for name, shape in OF_A_PATH.items()}}
        scan |= under(f"layers.{i}.mixer.", mixer) | under(f"layers.{i}.norm.", norm)
        for w in (1, 2, 3):
            scan |= linear(f"layers.{i}.mlp.w{w}", WIDTH, WIDTH)
    language = under(f"model.llm_backbone.{prefix}", mamba(MAMBA2, 50288))
    connector = linear("model.mlp.0", FEATURES, WIDTH) | under("model.bidirectional_mamba.", scan) | fused_mlp(WIDTH)
    return connector | language


def cobra(prefix: str) -> Shapes:
    return fused_mlp(FEATURES) | under(f"model.llm_backbone.{prefix}", mamba(MAMBA1, 50280))


def vicuna() -> Shapes:
    square, up, down = (4096, 4096), (11008, 4096), (4096, 11008)
    shapes: Shapes = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (32000, 4096))
    for i in range(32):
        layer: Shapes = {f"self_attn.{x}_proj.weight": square for x in "qkvo"}
        layer |= {"mlp.gate_proj.weight": up, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down}
        layer |= {f"{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
        shapes |= under(f"model.layers.{i}.", {**layer, "self_attn.rotary_emb.inv_freq": (64,)})
    return {**shapes, "model.norm.weight": (4096,)}


# The complete `config.json` of each file.
MAMBA2_SSM = """{
  "d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"},
  "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": true, "residual_in_fp32": true, "fused_add_norm": true,
  "pad_vocab_size_multiple": 16, "tie_embeddings": true
}"""
MAMBA1_SSM = """{
  "d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": true, "residual_in_fp32": true,
  "fused_add_norm": true, "pad_vocab_size_multiple": 8
}"""
MAMBA2_HF = """{
  "architectures": ["Mamba2ForCausalLM"], "bos_token_id": 0, "chunk_size": 256, "conv_kernel": 4, "eos_token_id": 0,
  "expand": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.1,
  "layer_norm_epsilon": 1e-05, "model_type": "mamba2", "n_groups": 1, "norm_before_gate": true, "num_heads": 80,
  "num_hidden_layers": 64, "pad_token_id": 0, "rescale_prenorm_residual": false, "residual_in_fp32": true,
  "rms_norm": true, "state_size": 128, "tie_word_embeddings": true, "time_step_floor": 0.0001,
  "time_step_init_scheme": "random", "time_step_limit": [0.0, Infinity], "time_step_max": 0.1, "time_step_min": 0.001,
  "time_step_rank": 160, "time_step_scale": 1.0, "torch_dtype": "float16", "transformers_version": "4.44.0.dev0",
  "use_bias": false, "use_cache": true, "use_conv_bias": true, "vocab_size": 50288
}"""
MAMBA1_HF = """{
  "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 5120, "d_model": 2560,
  "eos_token_id": 0, "expand": 2, "fused_add_norm": true, "hidden_act": "silu", "hidden_size": 2560,
  "initializer_range": 0.1, "intermediate_size": 5120, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
  "n_layer": 64, "num_hidden_layers": 64, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
  "rescale_prenorm_residual": false, "residual_in_fp32": true, "rms_norm": true, "ssm_cfg": {}, "state_size": 16,
  "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
  "time_step_rank": 160, "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
  "use_bias": false, "use_cache": true, "use_conv_bias": true, "vocab_size": 50280
}"""
VICUNA = """{
  "_name_or_path": "vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
  "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
  "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
  "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": true,
  "vocab_size": 32000
}"""
# Layout, recipe whose model or language model it fills, names and shapes, config.json.
FILES: dict[str, tuple[str, str, Shapes, str]] = {
    "ML-Mamba": ("ml_mamba_release", "ml_mamba", ml_mamba(""), "{}"),
    "ML-Mamba, wrapped": ("ml_mamba_release", "ml_mamba", ml_mamba("llm."), "{}"),
    "Cobra": ("cobra_release", "cobra", cobra("llm."), "{}"),
    "mamba2-2.7b": ("state_spaces", "ml_mamba", mamba(MAMBA2, 50288), MAMBA2_SSM),
    "mamba-2.8b-slimpj": ("state_spaces", "vl_mamba", mamba(MAMBA1, 50280), MAMBA1_SSM),
    "mamba2-2.7b-hf": ("transformers_mamba", "ml_mamba", mamba(MAMBA2, 50288, "embeddings"), MAMBA2_HF),
    "mamba-2.8b-hf": ("transformers_mamba", "vl_mamba", mamba(MAMBA1, 50280, "embeddings"), MAMBA1_HF),
    "vicuna-7b-v1.5": ("transformers", "mamba_vlm_7b", vicuna(), VICUNA),
}


on_meta = cache(partial(ssmvl.build_model, device="meta"))


@pytest.mark.parametrize("file", FILES)
def test_a_published_checkpoint_fits_its_recipe_and_matches_no_other_layout(file: str) -> None:
    name, recipe, shapes, text = FILES[file]
    config = json.loads(text)
    functions = {other: components().find("checkpoint", other).load() for other in components().names("checkpoint")}
    layouts = {other: function(names=shapes.keys(), config=config) for other, function in functions.items()}
    assert [other for other, layout in layouts.items() if layout is not None] == [name]
    model = on_meta(recipe)
    module = model if name.endswith("_release") else model.language
    layouts[name].check(module, {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, file)
