"""How others write the weights of Mamba language models: the layouts of state-spaces and of transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import inf
from typing import Any

from ssmvl.checkpoints import Layout

NAMES = {
    "layers.*": ["backbone.layers.*"],
    "norm_f.*": ["backbone.norm_f.*"],
    "lm_head.*": ["lm_head.*"],
}
TIED = {"lm_head.weight": "embedding.weight"}
HF_MODELS = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}
HF_LAYOUT = Layout(part="language", rules={"embedding.*": ["backbone.embeddings.*"], **NAMES}, tied=TIED)


def state_spaces(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of `state-spaces/mamba-*` and `mamba2-*`, as mamba-ssm writes it."""
    if "backbone.embedding.weight" not in names:
        return None
    options, expects = config.get("ssm_cfg") or {}, {}
    if options.get("layer", "Mamba1") == "Mamba2":  # of Mamba-1, shapes show everything
        expects = {
            "num_groups": options.get("ngroups", 1),
            "norm.groups": options.get("ngroups", 1),
            "d_state": options.get("d_state", 128),
            "head_dim": options.get("headdim", 64),
            "dt_limit": tuple(options.get("dt_limit", (0.0, inf))),
        }
        if options.get("norm_before_gate"):
            expects["norm_before_gate"] = True  # which no mixer here has
    rules = {"embedding.*": ["backbone.embedding.*"], **NAMES}
    return Layout(part="language", rules=rules, tied=TIED, expects=_of_mixers(expects))


def transformers_mamba(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of transformers' `MambaForCausalLM` and `Mamba2ForCausalLM`."""
    kind = config.get("model_type", "mamba")
    if "backbone.embeddings.weight" not in names or kind not in HF_MODELS:
        return None
    expects: dict[str, Any] = {}
    if kind == "mamba2":
        expects = {
            "num_groups": config["n_groups"],
            "norm.groups": 1,
            "d_state": config["state_size"],
            "head_dim": config["head_dim"],
            "dt_limit": tuple(config.get("time_step_limit", (0.0, inf))),
        }
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        expects["hidden_act"] = config["hidden_act"]  # which no mixer here has
    expects = _of_mixers(expects)
    if "layer_norm_epsilon" in config:
        expects["norm_f.eps"] = config["layer_norm_epsilon"]
    return replace(HF_LAYOUT, expects=expects)


def _of_mixers(expects: Mapping[str, Any]) -> dict[str, Any]:
    return {f"layers.0.mixer.{name}": value for name, value in expects.items()}
