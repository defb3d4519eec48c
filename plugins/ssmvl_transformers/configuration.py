"""A transformers configuration -> its model. Rejects unknown options, which transformers silently accepts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ssmvl.errors import ContractError, MissingDependencyError, nearest

# Architectures whose rows do not depend on padding, other rows or chunking; others may be silently wrong, and some are.
TESTED = (
    "exaone4 falcon gemma gemma3_text glm gpt2 gpt_neo gpt_neox gptj granite llama mistral mixtral olmo olmo2 opt "
    "persimmon phi phi3 qwen2 qwen2_moe qwen3 smollm3 stablelm starcoder2 xglm"
).split()
# Architecture options that change logits after the output embedding, with the values that have no effect.
LOGIT_OPTIONS = {
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
}
ROW_DEPENDENT = ("dynamic", "longrope")  # rotary frequencies depend on the longest row of a batch


def build_causal_lm(options: Mapping[str, Any]) -> Any:
    """Build the model of a configuration, with initial weights.

    Args:
        options: the content of the model's `config.json`; `model_type` names the architecture.

    Raises:
        ContractError: transformers does not know the architecture or an option, a value has the wrong type, or the
            architecture cannot satisfy the contract.
        MissingDependencyError: transformers is not installed.
    """
    with torch.device("cpu"):  # some modules that transformers imports lazily fail to import under `meta`
        config = _config(options)
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

        MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # imports the model
    reason = _contract_violation(config)
    if reason:
        raise ContractError(f"{config.model_type} cannot be a causal_lm: {reason}")
    try:
        model = AutoModelForCausalLM.from_config(config)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # third-party code, whose checks differ between architectures
        text = f"transformers cannot build a {config.model_type} model: {type(error).__name__}: {error}"
        raise ContractError(text) from error
    return model


def body_of(model: Any) -> Any:
    """The model without its head, including the final norm; its decoder if the model is its own base model."""
    return model.base_model if model.base_model is not model else model.get_decoder()


def config_of(kind: str, options: Mapping[str, Any]) -> Any:
    """Transformers' configuration of an architecture, with rotary scaling in one form. May raise any error."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **_convert_rope(kind, options))
    name = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"
    rope = getattr(config, name, None)
    if isinstance(rope, dict) and "type" in rope:  # the older key
        rope = {"rope_type": rope["type"], **{key: value for key, value in rope.items() if key != "type"}}
        setattr(config, name, rope)
    if name == "rope_scaling" and isinstance(rope, dict) and rope.get("rope_type") == "default":
        config.rope_scaling = None
    return config


def _convert_rope(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of options, with `rope_parameters` of transformers 5 converted for version 4, which ignores them."""
    from transformers import AutoConfig

    given = copy.deepcopy(dict(options))  # transformers modifies nested options
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
        what = f"config.model_type is {kind!r}, an architecture that causal_lm was not tested with."
        raise ContractError(what + nearest(str(kind), TESTED))
    try:
        given, default = _convert_rope(kind, given), AutoConfig.for_model(kind)
        for key, value in given.items():
            default_value = getattr(default, key, None)
            if not _has_type_of(default_value, key, value):
                raise ContractError(f"config.{key} must have the type of {default_value!r}, received {value!r}")
        config = config_of(kind, given)
    except ContractError:
        raise
    except Exception as error:  # third-party code
        raise ContractError(f"transformers rejects the {kind} config: {type(error).__name__}: {error}") from error
    names = set(inspect.signature(type(config).__init__).parameters) - {"self", "kwargs"}
    unknown = [key for key in given if key in vars(config).keys() - vars(default).keys() - names]
    if unknown:  # transformers stores any key, as an attribute that nothing reads
        raise ContractError(f"config of {kind} has no option {unknown[0]!r}.{nearest(unknown[0], names)}")
    config.dtype = None  # ignore the file's dtype and use torch's default
    return config


def _has_type_of(default: Any, key: str, value: Any) -> bool:
    """Return True if a value has the type of its default, as far as that is known; int and float are equivalent."""
    if value is None or default is None or (key.endswith("token_id") and isinstance(value, list)):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float)
    return isinstance(value, str) == isinstance(default, str)


def _contract_violation(config: Any) -> str:
    """The reason why a tested architecture's hidden states or logits would be wrong; empty if they are right."""
    for key, neutral in LOGIT_OPTIONS.items():
        value = getattr(config, key, None)
        if value not in neutral:
            allowed = " or ".join(map(repr, neutral))
            return f"config.{key}={value!r} changes the logits after the output embedding; it must be {allowed}"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type in ROW_DEPENDENT:
        return f"rope_type {rope_type!r} makes each row depend on the longest row of its batch"
    return ""
