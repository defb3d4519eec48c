"""Third-party checkpoint layouts of Mamba language models: state-spaces and transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import inf
from typing import Any

from ssmvl.checkpoints import Layout, need
from ssmvl.errors import CheckpointError

NAMES = {
    "layers.*": ["backbone.layers.*"],
    "norm_f.*": ["backbone.norm_f.*"],
    "lm_head.*": ["lm_head.*"],
}
TIED = {"lm_head.weight": "embedding.weight"}
HF_MODELS = {"mamba": ("Mamba1", "MambaForCausalLM"), "mamba2": ("Mamba2", "Mamba2ForCausalLM")}  # by model_type
HF_LAYOUT = Layout(part="language", rules={"embedding.*": ["backbone.embeddings.*"], **NAMES}, tied=TIED)
# Options of mamba-ssm's models. Those in FIXED_OPTIONS must have the value that models here support. `norm_epsilon`,
# `tie_embeddings`, `n_layer`, `d_model`, `expand` and `model_type` are compared with the model or its tensors, other
# sizes follow from shapes, and nothing depends on the rest.
FIXED_OPTIONS = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []}
MODEL_OPTIONS = {
    "d_model", "n_layer", "vocab_size", "ssm_cfg", "attn_cfg", "residual_in_fp32", "fused_add_norm",
    "pad_vocab_size_multiple", "tie_embeddings", "norm_epsilon", "expand", "initializer_cfg", "model_type",
    "architectures", "torch_dtype", "dtype", "transformers_version", *FIXED_OPTIONS,
}  # fmt: skip
# Arguments of mamba-ssm's layers. Those that are not compared below follow from shapes or names, or affect only initial
# values or speed.
SSM_OPTIONS = {
    "Mamba1": {
        "layer", "d_state", "d_conv", "expand", "conv_bias", "bias", "dt_rank", "dt_min", "dt_max", "dt_init",
        "dt_scale", "dt_init_floor", "use_fast_path",
    },
    "Mamba2": {
        "layer", "d_state", "d_conv", "expand", "conv_bias", "bias", "headdim", "ngroups", "dt_limit",
        "norm_before_gate", "d_ssm", "D_has_hdim", "rmsnorm", "dt_min", "dt_max", "dt_init_floor", "conv_init",
        "A_init_range", "chunk_size", "use_mem_eff_path", "sequence_parallel",
    },
}  # fmt: skip


def state_spaces(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """Layout of `state-spaces/mamba-*` and `mamba2-*`, as written by mamba-ssm.

    A Mamba-1 file needs no config, because all sizes follow from its shapes.

    Raises:
        CheckpointError: a Mamba-2 file has no config, or the config contradicts the tensors or has an
            unknown or unsupported option.
    """
    if "backbone.embedding.weight" not in names:
        return None
    kind = _kind(names)
    if kind == "Mamba2":
        need(config, ["ssm_cfg"], "Mamba-2")
    _require_model_options(config, names)
    options = config.get("ssm_cfg") or {}
    if not isinstance(options, Mapping):
        raise CheckpointError(f"its config.json has ssm_cfg = {options!r}; it must be a mapping")
    layer = options.get("layer", "Mamba1") if config else kind
    if layer != kind:
        raise CheckpointError(f"its config.json has layer {layer!r}, but the tensors are those of {kind}")
    unknown = sorted(options.keys() - SSM_OPTIONS[kind])
    if unknown:
        raise CheckpointError(
            f"its config.json has unknown ssm_cfg options for {kind}: {', '.join(unknown)}. "
            f"Allowed: {', '.join(sorted(SSM_OPTIONS[kind]))}"
        )
    expects: dict[str, Any] = {}
    if kind == "Mamba2":
        expects = {
            "num_groups": options.get("ngroups", 1),
            "norm.groups": options.get("ngroups", 1),
            "d_state": options.get("d_state", 128),
            "head_dim": options.get("headdim", 64),
            "dt_limit": _range(options.get("dt_limit", (0.0, inf))),
        }
        if options.get("norm_before_gate"):
            expects["norm_before_gate"] = True  # no mixer here supports it
    if "expand" in config:
        need(config, ["d_model"], kind)
        expects["inner"] = config["expand"] * config["d_model"]
    expects = _expected_attributes(kind, expects, config.get("norm_epsilon", 1e-5))
    if "d_model" in config:
        expects["width"] = config["d_model"]
    equal = {"lm_head.weight": "backbone.embedding.weight"} if config.get("tie_embeddings", bool(config)) else {}
    rules = {"embedding.*": ["backbone.embedding.*"], **NAMES}
    return Layout(part="language", rules=rules, tied=TIED, equal=equal, expects=expects)


def transformers_mamba(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """Layout of transformers' `MambaForCausalLM` and `Mamba2ForCausalLM`.

    Raises:
        CheckpointError: the config is missing (the file could then be FalconMamba's), describes another model or
            contradicts the tensors.
    """
    if "backbone.embeddings.weight" not in names:
        return None
    need(config, ["model_type"], "Mamba")
    layer, _ = HF_MODELS.get(str(config["model_type"]), ("", ""))
    if not layer:
        known = ", ".join(HF_MODELS)
        raise CheckpointError(f"its config.json has model_type {config['model_type']!r}; supported: {known}")
    kind = _kind(names)
    if layer != kind:
        raise CheckpointError(f"its config.json describes {layer}, but the tensors are those of {kind}")
    expects: dict[str, Any] = {}
    if kind == "Mamba2":
        need(config, ["n_groups", "state_size", "head_dim", "time_step_limit"], "Mamba-2")
        expects = {
            "num_groups": config["n_groups"],
            # transformers 4.57 and earlier normalize the whole width, 5 and later each group
            "norm.groups": _OneOf(1, config["n_groups"]),
            "d_state": config["state_size"],
            "head_dim": config["head_dim"],
            "dt_limit": _range(config["time_step_limit"]),
        }
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        expects["hidden_act"] = config["hidden_act"]  # no mixer here supports it
    tied = config.get("tie_word_embeddings", kind == "Mamba1")  # the defaults of transformers' two configurations
    equal = {"lm_head.weight": "backbone.embeddings.weight"} if tied else {}
    expects = _expected_attributes(kind, expects, config.get("layer_norm_epsilon", 1e-5))
    return replace(HF_LAYOUT, equal=equal, expects=expects)


class _OneOf:
    """A value that equals any of several values."""

    def __init__(self, *values: object) -> None:
        self.values = tuple(dict.fromkeys(values))

    def __eq__(self, other: object) -> bool:
        return other in self.values

    def __repr__(self) -> str:
        return " or ".join(map(repr, self.values))


def _require_model_options(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Check all options in a state-spaces config except `ssm_cfg`.

    Raises:
        CheckpointError: an option is unknown, contradicts the tensors, or has an unsupported value.
    """
    if unknown := sorted(config.keys() - MODEL_OPTIONS):
        known = ", ".join(sorted(MODEL_OPTIONS))
        raise CheckpointError(f"its config.json has unknown options: {', '.join(unknown)}. Allowed: {known}")
    layers = len({name.split(".")[2] for name in names if name.startswith("backbone.layers.")})
    if config.get("n_layer", layers) != layers:
        depth = config["n_layer"]
        raise CheckpointError(f"its config.json has n_layer {depth}, but the tensors have {layers} layers")
    if not str(config.get("model_type", "mamba")).startswith("mamba"):
        raise CheckpointError(
            f"its config.json has model_type {config['model_type']!r}, but mamba-ssm's model types start with 'mamba'"
        )
    for key, allowed in FIXED_OPTIONS.items():
        if config.get(key, allowed) != allowed:
            raise CheckpointError(f"its config.json has {key} = {config[key]!r}; only {allowed!r} is supported")


def _kind(names: Collection[str]) -> str:
    """Layer type of the tensors; only Mamba-2 has a separate step-size bias."""
    return "Mamba2" if any(name.endswith(".mixer.dt_bias") for name in names) else "Mamba1"


def _range(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _expected_attributes(kind: str, mixer: Mapping[str, Any], eps: float) -> dict[str, Any]:
    norms = ["norm_f", "layers.0.norm", *(["layers.0.mixer.norm"] if kind == "Mamba2" else [])]
    expects = {f"layers.0.mixer.{name}": value for name, value in mixer.items()}
    return expects | {f"{name}.eps": eps for name in norms}
