"""How others write the weights of Mamba language models: the layouts of state-spaces and of transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ssmvl.checkpoints import Layout
from ssmvl.errors import ContractError
from ssmvl.language.mamba_lm import MambaLM
from ssmvl.layers.mamba1 import Mamba1Mixer
from ssmvl.layers.mamba2 import Mamba2Mixer

NAMES = {
    "layers.*": ["backbone.layers.*"],
    "norm_f.*": ["backbone.norm_f.*"],
    "lm_head.*": ["lm_head.*"],
}
TIED = {"lm_head.weight": "embedding.weight"}
HF_MODELS = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}


def state_spaces(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of `state-spaces/mamba-*` and `mamba2-*`, as mamba-ssm writes it."""
    if "backbone.embedding.weight" not in names:
        return None
    options = dict(config.get("ssm_cfg") or {})
    expects = {}
    if options.pop("layer", "Mamba1") == "Mamba2":
        groups = options.pop("ngroups", 1)
        options = {"d_state": 128, "headdim": 64, **options}
        expects = {"layers.0.mixer.num_groups": groups, "layers.0.mixer.norm.groups": groups}
    options.pop("chunk_size", None)  # says how it is computed, not what
    ours = {"headdim": "head_dim"}
    expects |= {f"layers.0.mixer.{ours.get(name, name)}": value for name, value in options.items()}
    rules = {"embedding.*": ["backbone.embedding.*"], **NAMES}
    return Layout(part="language", rules=rules, tied=TIED, expects=expects)


def transformers_mamba(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of transformers' `MambaForCausalLM` and `Mamba2ForCausalLM`."""
    kind = config.get("model_type", "mamba")
    if "backbone.embeddings.weight" not in names or kind not in HF_MODELS:
        return None
    expects = {"norm_f.eps": config["layer_norm_epsilon"]} if "layer_norm_epsilon" in config else {}
    if kind == "mamba2":
        expects |= {
            "layers.0.mixer.num_groups": config["n_groups"],
            "layers.0.mixer.norm.groups": 1,
            "layers.0.mixer.d_state": config["state_size"],
            "layers.0.mixer.head_dim": config["head_dim"],
            "layers.0.mixer.dt_limit": tuple(config.get("time_step_limit", (0.0, float("inf")))),
        }
    rules = {"embedding.*": ["backbone.embeddings.*"], **NAMES}
    return Layout(part="language", rules=rules, tied=TIED, expects=expects)


def to_transformers(language: nn.Module, end_id: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A Mamba language model as transformers names it: its tensors and its `config.json`.

    Args:
        language: a `MambaLM` whose mixers transformers has.
        end_id: id of the end token.

    Raises:
        ContractError: transformers has no such model; says why.
    """
    mixer = language.layers[0].mixer if isinstance(language, MambaLM) else language
    if not isinstance(language, MambaLM) or not isinstance(mixer, Mamba1Mixer | Mamba2Mixer):
        raise ContractError(f"{type(mixer).__name__} is no Mamba-1 or Mamba-2 mixer; transformers' layout is theirs")
    config: dict[str, Any] = {
        "hidden_size": language.width,
        "num_hidden_layers": len(language.layers),
        "vocab_size": language.vocab_rows,
        "state_size": mixer.d_state,
        "expand": mixer.inner // language.width,
        "conv_kernel": mixer.conv1d.kernel_size[0],
        "layer_norm_epsilon": language.norm_f.eps,
        "tie_word_embeddings": language.lm_head is None,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
    }
    if isinstance(mixer, Mamba2Mixer):
        if mixer.norm.groups > 1:
            raise ContractError("transformers' Mamba-2 normalises the whole inner width: norm_groups must be 1")
        config |= {"model_type": "mamba2", "head_dim": mixer.head_dim, "num_heads": mixer.heads}
        config |= {"n_groups": mixer.num_groups, "time_step_limit": list(mixer.dt_limit)}
    else:
        config |= {"model_type": "mamba", "intermediate_size": mixer.inner, "time_step_rank": mixer.dt_rank}
    named = language.state_dict()
    layout = transformers_mamba(["backbone.embeddings.weight"], config)
    table = {} if layout is None else layout.table(named)
    return {table[name][0]: named[name] for name in named}, {
        "architectures": [HF_MODELS[config["model_type"]]],
        **config,
    }
