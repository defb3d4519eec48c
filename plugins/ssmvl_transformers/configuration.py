"""A configuration as transformers writes it -> its model, strictly where transformers is silent."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ssmvl.errors import ContractError, MissingDependencyError, nearest

# Architectures whose rows are as alone, however they are padded and cut; others may be silently wrong, and some are.
TESTED = (
    "exaone4 falcon gemma gemma3_text glm gpt2 gpt_neo gpt_neox gptj granite llama mistral mixtral olmo olmo2 opt "
    "persimmon phi phi3 qwen2 qwen2_moe qwen3 smollm3 stablelm starcoder2 xglm"
).split()
# Options of architectures that change logits after the output embedding, with the values that leave them as they are.
LOGIT_OPTIONS = {
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
}
ROW_DEPENDENT = ("dynamic", "longrope")  # rotary frequencies that follow the longest row of a batch


def build_causal_lm(options: Mapping[str, Any]) -> Any:
    """The model of a configuration, with initial weights.

    Args:
        options: what `config.json` of such a model holds; `model_type` names the architecture.

    Raises:
        ContractError: an architecture or an option that transformers does not have, a value of the wrong type, or an
            architecture that cannot keep the contract.
        MissingDependencyError: transformers is not installed.
    """
    with torch.device("cpu"):  # what transformers and torch import on the way fails under `meta`
        config = _config(options)
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

        MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # imports the model
    reason = _unfit(config)
    if reason:
        raise ContractError(f"{config.model_type} cannot be a causal_lm: {reason}")
    try:
        model = AutoModelForCausalLM.from_config(config)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # foreign code, whose checks differ from architecture to architecture
        text = f"config gives no {config.model_type} model: {type(error).__name__}: {error}"
        raise ContractError(text) from error
    return model


def body_of(model: Any) -> Any:
    """What lies between embedding and head, the final norm included; the model itself where nothing does."""
    return model.base_model if model.base_model is not model else model.get_decoder()


def config_of(kind: str, options: Mapping[str, Any]) -> Any:
    """Transformers' configuration of an architecture, its rotary scaling written in one way; it may raise anything."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **_lifted(kind, options))
    name = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"
    rope = getattr(config, name, None)
    if isinstance(rope, dict) and "type" in rope:  # the older word
        rope = {"rope_type": rope["type"], **{key: value for key, value in rope.items() if key != "type"}}
        setattr(config, name, rope)
    if name == "rope_scaling" and isinstance(rope, dict) and rope.get("rope_type") == "default":
        config.rope_scaling = None
    return config


def _lifted(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of options, the `rope_parameters` of transformers 5 as version 4 has them, which would not read them."""
    from transformers import AutoConfig

    given = copy.deepcopy(dict(options))  # transformers writes into nested options
    default = AutoConfig.for_model(kind)
    if given.get("rope_parameters") is None or hasattr(default, "rope_parameters"):
        return given
    rope = dict(given.pop("rope_parameters"))
    if "full_attention" in rope:  # Gemma 3 has two sets
        given["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    for name, neox in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        if name in rope:
            given[neox if hasattr(default, neox) else name] = rope.pop(name)
    if rope.get("rope_type", "default") != "default":
        given["rope_scaling"] = rope
    return given


def _config(options: Mapping[str, Any]) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        text = f"causal_lm needs transformers ({error}): pip install 'ssmvl[transformers]'"
        raise MissingDependencyError(text) from error
    given = dict(options)
    kind = given.pop("model_type", None)
    if kind not in TESTED:
        what = f"config.model_type is {kind!r}, which is none of the architectures that causal_lm was tested with."
        raise ContractError(what + nearest(str(kind), TESTED))
    try:
        given, default = _lifted(kind, given), AutoConfig.for_model(kind)
        for key, value in given.items():
            usual = getattr(default, key, None)
            if not _fits(key, value, usual):
                raise ContractError(f"config.{key} must be of the type of {usual!r}, received {value!r}")
        config = config_of(kind, given)
    except ContractError:
        raise
    except Exception as error:  # foreign code
        raise ContractError(f"config of {kind} is refused: {type(error).__name__}: {error}") from error
    names = set(inspect.signature(type(config).__init__).parameters) - {"self", "kwargs"}
    unknown = [key for key in given if key in vars(config).keys() - vars(default).keys() - names]
    if unknown:  # transformers keeps any key, as an attribute that nothing reads
        raise ContractError(f"config of {kind} has no option {unknown[0]!r}.{nearest(unknown[0], names)}")
    config.dtype = None  # the file's; here torch's default decides
    return config


def _fits(key: str, value: Any, default: Any) -> bool:
    """Whether a value is of its default's type, as far as that tells; numbers may be written either way."""
    if value is None or default is None or (key.endswith("token_id") and isinstance(value, list)):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float)
    return isinstance(value, str) == isinstance(default, str)


def _unfit(config: Any) -> str:
    """Why a tested architecture would give wrong hidden states or logits all the same; empty if it gives right ones."""
    for key, neutral in LOGIT_OPTIONS.items():
        value = getattr(config, key, None)
        if value not in neutral:
            allowed = " or ".join(map(repr, neutral))
            return f"config.{key}={value!r} changes the logits after the output embedding; it must be {allowed}"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    turning = rope.get("rope_type", rope.get("type"))
    if turning in ROW_DEPENDENT:
        return f"rope_type {turning!r} makes each row depend on the longest of its batch"
    return ""
