"""Checkpoint layout of transformers' causal language models."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ssmvl.checkpoints import Layout, need
from ssmvl.errors import CheckpointError
from ssmvl_transformers.configuration import config_of

HEADS = {"lm_head", "embed_out", "output_projection"}
BODIES = ("model", "transformer", "gpt_neox")  # the architectures' names of the model without its head
TOKENS = re.compile(r"(embed_tokens|word_embeddings|embed_in|wte)\.weight")
EMBEDDING = re.compile(rf"(\w+\.)?(decoder\.)?{TOKENS.pattern}")
ATTENTION = re.compile(r"(\w+\.)+\d+\.\w*att\w*\..+")
# Buffers in older files: tables of rotary frequencies, and causal masks with their fill value.
TABLES = ("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias", "*.attn.bias", "*.attn.masked_bias")
# Architecture options that affect no output or that shapes reveal.
IDLE = re.compile(
    r"use_cache|pretraining_tp|initializer_range|init_std|max_position_embeddings|max_window_layers|output_router_logits"
    r"|router_(aux_loss_coef|jitter_noise)|summary_\w+|\w*(token_id|drop)\w*"
)


def transformers_causal_lm(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """Layout of an attention model written by `save_pretrained`: one body, and a head unless it is tied.

    Args:
        names: names of the file's tensors.
        config: its `config.json`; settings that shapes do not reveal must match the recipe.

    Raises:
        CheckpointError: the config is missing, or transformers rejects it.
    """
    tops = {name.partition(".")[0] for name in names}
    bare = tops - HEADS == {"decoder"} or any(map(TOKENS.fullmatch, names))  # body only, like gpt2 on the Hub
    if not all(any(map(kind.fullmatch, names)) for kind in (EMBEDDING, ATTENTION)):
        return None
    if not bare and len(tops - HEADS) != 1:
        return None
    # A head may be renamed by a new version of transformers, while files keep the old name.
    heads = {f"model.{own}.*": [f"{head}.*"] for head in tops & HEADS for own in HEADS}
    expects, tied = _expected(config)
    (embedding,) = [name for name in names if EMBEDDING.fullmatch(name)][:1]
    equal = {f"{head}.weight": embedding for head in tops & HEADS} if tied else {}
    bodies = {f"model.{body}.*": ["*"] for body in BODIES} if bare else {}
    return Layout(
        part="language",
        rules={**heads, **bodies, "model.*": ["*"]},
        ignored=TABLES,
        equal=equal,
        expects=expects,
    )


def _expected(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The architecture's own options as the installed transformers reads them, and True if the head is tied."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    need(config, ["model_type"], "attention")
    given = dict(config)
    kind = given.pop("model_type")
    expected, tied = {"model_type": kind}, False
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        try:
            file_config, default = config_of(kind, given), config_of(kind, {})
        except Exception as error:  # third-party code
            why = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"transformers rejects its {kind} config.json ({why})") from error
        tied = bool(getattr(file_config, "tie_word_embeddings", False))
        own = {key for key in vars(default).keys() - vars(PretrainedConfig()).keys() if not IDLE.fullmatch(key)}
        if kind == "xglm":  # the position embedding at this index is zero
            own.add("pad_token_id")
        if getattr(file_config, "use_sliding_window", False):
            own |= vars(file_config).keys() & {"max_window_layers"}  # the first layer with a window
        ropes = [getattr(file_config, name, None) for name in ("rope_scaling", "rope_parameters")]
        if ropes[0] is not None:  # even if the architecture has no such option
            own.add("rope_scaling")
        if any(isinstance(rope, Mapping) and rope.get("rope_type") == "yarn" for rope in ropes):
            own.add("max_position_embeddings")  # YaRN scales relative to it
        expected |= {key: getattr(file_config, key, None) for key in sorted(own)}
    return {f"model.config.{key}": value for key, value in expected.items()}, tied
