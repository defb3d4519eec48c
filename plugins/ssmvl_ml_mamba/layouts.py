"""The published `.pt` files of ML-Mamba and of Cobra: connector and language model, without the frozen encoders."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ssmvl.checkpoints import Layout

SCAN = "model.bidirectional_mamba"
OF_A_PATH = {  # what each scan path has of its own: the forward path's, the backward path's
    "conv1d.weight": "conv1d_b.weight",
    "conv1d.bias": "conv1d_b.bias",
    "dt_bias": "dt_bias_b",
    "A_log": "A_log_b",
    "D": "D_b",
}


def ml_mamba_release(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of ML-Mamba's released checkpoints, into `msc_advanced` with two paths and a Mamba-2 model."""
    if f"{SCAN}.norm_f.weight" not in names:
        return None
    connector = {
        "connector.stem.*": ["model.mlp.*"],
        **{
            f"connector.layers.*.mixer.{forward}": [f"{SCAN}.layers.*.mixer.{own}" for own in (forward, backward)]
            for forward, backward in OF_A_PATH.items()
        },
        "connector.layers.*.mlp_norm.*": [f"{SCAN}.layers.*.norm.*"],
        "connector.layers.*": [f"{SCAN}.layers.*"],
        "connector.projector.0.*": [f"{SCAN}.norm_f.*"],
        "connector.projector.1.*": ["model.projector.projector.*"],
    }
    return _with_language(connector, names)


def cobra_release(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """The layout of Cobra's released checkpoints, into `mlp` and a Mamba-1 model."""
    if "model.projector.projector.0.weight" not in names or f"{SCAN}.norm_f.weight" in names:
        return None
    return _with_language({"connector.projector.*": ["model.projector.projector.*"]}, names)


def _with_language(connector: Mapping[str, list[str]], names: Collection[str]) -> Layout:
    wrapped = any(name.startswith("model.llm_backbone.llm.") for name in names)
    theirs = "model.llm_backbone.llm" if wrapped else "model.llm_backbone"
    language = {f"language.{part}.*": [f"{theirs}.backbone.{part}.*"] for part in ("embedding", "layers", "norm_f")}
    return Layout(
        part="model",
        rules={**connector, **language},
        tied={f"{theirs}.lm_head.weight": "language.embedding.weight"},
        absent=["encoders"],
    )
