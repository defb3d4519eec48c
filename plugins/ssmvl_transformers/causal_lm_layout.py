"""How transformers writes the weights of a causal language model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ssmvl.checkpoints import Layout, need
from ssmvl.errors import CheckpointError
from ssmvl_transformers.configuration import config_of

HEADS = {"lm_head", "embed_out", "output_projection"}
BODIES = ("model", "transformer", "gpt_neox")  # what the architectures call what lies below the head
TOKENS = re.compile(r"(embed_tokens|word_embeddings|embed_in|wte)\.weight")
EMBEDDING = re.compile(rf"(\w+\.)?(decoder\.)?{TOKENS.pattern}")
ATTENTION = re.compile(r"(\w+\.)+\d+\.\w*att\w*\..+")
# Buffers that older files hold: tables of rotary angles, and of Llama's kin and GPT's the mask and its value.
TABLES = ("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias", "*.attn.bias", "*.attn.masked_bias")
# Options of architectures whose value no answer depends on, or which shapes show.
IDLE = re.compile(
    r"use_cache|pretraining_tp|initializer_range|init_std|max_position_embeddings|max_window_layers|output_router_logits"
    r"|router_(aux_loss_coef|jitter_noise)|summary_\w+|\w*(token_id|drop)\w*"
)


def transformers_causal_lm(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of what `save_pretrained` writes of an attention model: one body, and a head unless it is tied.

    Args:
        names: of the file's tensors.
        config: its `config.json`; what it says and no shape shows must be as the recipe's.

    Raises:
        CheckpointError: the config is missing, or transformers refuses it.
    """
    tops = {name.partition(".")[0] for name in names}
    bare = tops - HEADS == {"decoder"} or any(map(TOKENS.fullmatch, names))  # the body alone, as the hub's gpt2
    if not all(any(map(kind.fullmatch, names)) for kind in (EMBEDDING, ATTENTION)):
        return None
    if not bare and len(tops - HEADS) != 1:
        return None
    # The name of a head may change from one version of transformers to the next, while files keep theirs.
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
    """The architecture's own options, as the installed transformers gives them, and whether the head is tied."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    need(config, ["model_type"], "attention")
    given = dict(config)
    kind = given.pop("model_type")
    expected, tied = {"model_type": kind}, False
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        try:
            theirs, default = config_of(kind, given), config_of(kind, {})
        except Exception as error:  # foreign code
            why = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"transformers refuses the {kind} config.json beside it ({why})") from error
        tied = bool(getattr(theirs, "tie_word_embeddings", False))
        own = {key for key in vars(default).keys() - vars(PretrainedConfig()).keys() if not IDLE.fullmatch(key)}
        if kind == "xglm":  # its positions at that number are zero
            own.add("pad_token_id")
        if getattr(theirs, "use_sliding_window", False):
            own |= vars(theirs).keys() & {"max_window_layers"}  # the first layer with a window
        rope = [getattr(theirs, name, None) for name in ("rope_scaling", "rope_parameters")]
        if rope[0] is not None:  # also where the architecture has no such option
            own.add("rope_scaling")
        if any(isinstance(found, Mapping) and found.get("rope_type") == "yarn" for found in rope):
            own.add("max_position_embeddings")  # from which YaRN counts
        expected |= {key: getattr(theirs, key, None) for key in sorted(own)}
    return {f"model.config.{key}": value for key, value in expected.items()}, tied
