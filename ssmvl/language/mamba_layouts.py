"""How others write the weights of Mamba language models: the layouts of state-spaces and of transformers."""

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
# Options of mamba-ssm's models. Those in ONLY have one value that a model here has; of the others, `norm_epsilon`,
# `tie_embeddings` and `n_layer` are compared, shapes show the sizes, and nothing depends on the rest.
ONLY = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []}
MODEL_OPTIONS = {
    "d_model", "n_layer", "vocab_size", "ssm_cfg", "attn_cfg", "residual_in_fp32", "fused_add_norm",
    "pad_vocab_size_multiple", "tie_embeddings", "norm_epsilon", "expand", "initializer_cfg", "model_type",
    "architectures", "torch_dtype", "dtype", "transformers_version", *ONLY,
}  # fmt: skip
# Arguments of mamba-ssm's layers. What is not compared below, shapes or names show, or only initial values or speed
# depend on it.
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
    """The layout of `state-spaces/mamba-*` and `mamba2-*`, as mamba-ssm writes it.

    Raises:
        CheckpointError: a Mamba-2 file without its config, or a config that says something else than the tensors, or
            something unknown. Of Mamba-1, shapes show everything.
    """
    if "backbone.embedding.weight" not in names:
        return None
    kind = _kind(names)
    if kind == "Mamba2":
        need(config, ["ssm_cfg"], "Mamba-2")
    _require_model_options(config, names)
    options = config.get("ssm_cfg") or {}
    if not isinstance(options, Mapping):
        raise CheckpointError(f"the config.json beside it has {options!r} as ssm_cfg; it must be a mapping")
    said = options.get("layer", "Mamba1") if config else kind
    if said != kind:
        raise CheckpointError(f"the config.json beside it says layer {said!r}, but the tensors are of {kind}")
    unknown = sorted(options.keys() - SSM_OPTIONS[kind])
    if unknown:
        raise CheckpointError(
            f"the config.json beside it has ssm_cfg options that no {kind} layer here knows: {', '.join(unknown)}; "
            f"known are {', '.join(sorted(SSM_OPTIONS[kind]))}"
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
            expects["norm_before_gate"] = True  # which no mixer here has
    if "expand" in config:
        need(config, ["d_model"], kind)
        expects["inner"] = config["expand"] * config["d_model"]
    expects = _expects(kind, expects, config.get("norm_epsilon", 1e-5))
    if "d_model" in config:
        expects["width"] = config["d_model"]
    equal = {"lm_head.weight": "backbone.embedding.weight"} if config.get("tie_embeddings", bool(config)) else {}
    rules = {"embedding.*": ["backbone.embedding.*"], **NAMES}
    return Layout(part="language", rules=rules, tied=TIED, equal=equal, expects=expects)


def transformers_mamba(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of transformers' `MambaForCausalLM` and `Mamba2ForCausalLM`.

    Raises:
        CheckpointError: the file has no config, without which it could be FalconMamba's, or one of another layer.
    """
    if "backbone.embeddings.weight" not in names:
        return None
    need(config, ["model_type"], "Mamba")
    said, _ = HF_MODELS.get(str(config["model_type"]), ("", ""))
    if not said:
        known = ", ".join(HF_MODELS)
        raise CheckpointError(f"the config.json beside it has model_type {config['model_type']!r}; supported: {known}")
    kind = _kind(names)
    if said != kind:
        raise CheckpointError(f"the config.json beside it is of {said}, but the tensors are of {kind}")
    expects: dict[str, Any] = {}
    if kind == "Mamba2":
        need(config, ["n_groups", "state_size", "head_dim", "time_step_limit"], "Mamba-2")
        expects = {
            "num_groups": config["n_groups"],
            # transformers normalizes the whole width up to version 4.57 and each group from version 5 on
            "norm.groups": _OneOf(1, config["n_groups"]),
            "d_state": config["state_size"],
            "head_dim": config["head_dim"],
            "dt_limit": _range(config["time_step_limit"]),
        }
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        expects["hidden_act"] = config["hidden_act"]  # which no mixer here has
    tied = config.get("tie_word_embeddings", kind == "Mamba1")  # as transformers' two configurations have it
    equal = {"lm_head.weight": "backbone.embeddings.weight"} if tied else {}
    return replace(HF_LAYOUT, equal=equal, expects=_expects(kind, expects, config.get("layer_norm_epsilon", 1e-5)))


class _OneOf:
    """Equal to each of some values."""

    def __init__(self, *values: object) -> None:
        self.values = tuple(dict.fromkeys(values))

    def __eq__(self, other: object) -> bool:
        return other in self.values

    def __repr__(self) -> str:
        return " or ".join(map(repr, self.values))


def _require_model_options(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Check the options of a state-spaces config beside `ssm_cfg`.

    Raises:
        CheckpointError: one is unknown, describes another model than the tensors, or none that is built here.
    """
    if unknown := sorted(config.keys() - MODEL_OPTIONS):
        known = ", ".join(sorted(MODEL_OPTIONS))
        raise CheckpointError(
            f"the config.json beside it has options that are unknown here: {', '.join(unknown)}; known are {known}"
        )
    layers = len({name.split(".")[2] for name in names if name.startswith("backbone.layers.")})
    if config.get("n_layer", layers) != layers:
        raise CheckpointError(f"the config.json beside it says n_layer {config['n_layer']}, the tensors have {layers}")
    if not str(config.get("model_type", "mamba")).startswith("mamba"):
        raise CheckpointError(
            f"the config.json beside it has model_type {config['model_type']!r}, not that of mamba-ssm"
        )
    for key, allowed in ONLY.items():
        if config.get(key, allowed) != allowed:
            raise CheckpointError(
                f"the config.json beside it has {key} = {config[key]!r}; only {allowed!r} is supported"
            )


def _kind(names: Collection[str]) -> str:
    """Which layer the tensors are of; only one of the two has a step size bias apart."""
    return "Mamba2" if any(name.endswith(".mixer.dt_bias") for name in names) else "Mamba1"


def _range(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _expects(kind: str, of_mixers: Mapping[str, Any], eps: float) -> dict[str, Any]:
    norms = ["norm_f", "layers.0.norm", *(["layers.0.mixer.norm"] if kind == "Mamba2" else [])]
    expects = {f"layers.0.mixer.{name}": value for name, value in of_mixers.items()}
    return expects | {f"{name}.eps": eps for name in norms}
