"""How transformers writes the weights of a causal language model."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

from ssmvl.checkpoints import Layout

HEADS = {"lm_head", "embed_out", "output_projection"}
EMBEDDING = re.compile(r"\w+\.(decoder\.)?(embed_tokens|word_embeddings|embed_in|wte)\.weight")
ATTENTION = re.compile(r"\w+\.(\w+\.)*\d+\.\w*att\w*\..+")
# Options of architectures whose value no answer depends on, or which shapes show.
IDLE = re.compile(r"use_cache|pretraining_tp|initializer_range|max_position_embeddings|\w*(token_id|drop)\w*")


def transformers_causal_lm(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of what `save_pretrained` writes of an attention model: one body, and a head unless it is tied.

    Args:
        names: of the file's tensors.
        config: its `config.json`; what it says and no shape shows must be as the recipe's.
    """
    tops = {name.partition(".")[0] for name in names}
    if len(tops - HEADS) != 1 or not all(any(map(kind.fullmatch, names)) for kind in (EMBEDDING, ATTENTION)):
        return None
    # The name of a head may change from one version of transformers to the next, while files keep theirs.
    heads = {f"model.{own}.*": [f"{head}.*"] for head in tops & HEADS for own in HEADS}
    return Layout(
        part="language",
        rules={**heads, "model.*": ["*"]},
        ignored=["*.rotary_emb.inv_freq"],  # older files of Llama and its kin hold the table
        expects=_expected(config) if config else {},
    )


def _expected(config: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture's own options, in the form that the installed transformers gives them on both sides."""
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    given = copy.deepcopy(dict(config))
    kind = given.pop("model_type", None)
    expected = {"model_type": kind}
    if kind in CONFIG_MAPPING:
        theirs, default = AutoConfig.for_model(kind, **given), AutoConfig.for_model(kind)
        own = vars(default).keys() - vars(PretrainedConfig()).keys()
        expected |= {key: getattr(theirs, key) for key in sorted(own) if not IDLE.fullmatch(key)}
    return {f"model.config.{key}": value for key, value in expected.items()}
