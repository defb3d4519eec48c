"""Layouts of the published `.pt` files of ML-Mamba and Cobra: connector and language model, without the encoders."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf
from typing import Any

import torch

from ssmvl.checkpoints import Layout
from ssmvl.interfaces import Grid
from ssmvl.ops.reorder import path_table
from ssmvl.scans import bsm

SCAN = "model.bidirectional_mamba"
PATH_PARAMETERS = {  # per-path parameters: name for the forward path -> name for the backward path
    "conv1d.weight": "conv1d_b.weight",
    "conv1d.bias": "conv1d_b.bias",
    "dt_bias": "dt_bias_b",
    "A_log": "A_log_b",
    "D": "D_b",
}
# Settings of the releases that shapes do not reveal; the files come without a config.
MAMBA2 = {"num_groups": 1, "norm.groups": 1, "norm.eps": 1e-5, "dt_limit": (0.0, inf)}
FEATURES = {
    "fusion.__class__.__name__": "ChannelFusion",
    "fusion.order": ["dinov2", "siglip"],
    "encoders.dinov2.image_spec.resize": "resize-naive",
    "encoders.siglip.image_spec.resize": "resize-naive",
}


class _Paths:
    """Equal to every scan order, with or without bound options, that has the release's paths over its grid."""

    grid = Grid(1, 27, 27)

    def __eq__(self, other: object) -> bool:
        return callable(other) and torch.equal(path_table(other, self.grid), path_table(bsm, self.grid))

    def __repr__(self) -> str:
        return "the paths of bsm"


def ml_mamba_release(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """Layout of ML-Mamba's released checkpoints, for `msc_advanced` with two paths and a Mamba-2 model."""
    if f"{SCAN}.norm_f.weight" not in names:
        return None
    connector = {
        "connector.stem.*": ["model.mlp.*"],
        **{
            f"connector.layers.*.mixer.{forward}": [f"{SCAN}.layers.*.mixer.{name}" for name in (forward, backward)]
            for forward, backward in PATH_PARAMETERS.items()
        },
        "connector.layers.*.mlp_norm.*": [f"{SCAN}.layers.*.norm.*"],
        "connector.layers.*": [f"{SCAN}.layers.*"],
        "connector.projector.0.*": [f"{SCAN}.norm_f.*"],
        "connector.projector.1.*": ["model.projector.projector.*"],
    }
    fixed = {
        "connector.paths.order": _Paths(),
        "connector.layers.0.mixer.folding.merge_by": "mean",
        **{f"connector.layers.0.mixer.{name}": value for name, value in MAMBA2.items()},
        "connector.layers.0.mlp_norm.eps": 1e-5,
        "connector.projector.0.eps": 1e-5,
    }
    return _with_language(connector, names, fixed)


def cobra_release(names: Collection[str], config: Mapping[str, Any]) -> Layout | None:
    """Layout of Cobra's released checkpoints, for `mlp` and a Mamba-1 model."""
    if "model.projector.projector.0.weight" not in names or f"{SCAN}.norm_f.weight" in names:
        return None
    return _with_language({"connector.projector.*": ["model.projector.projector.*"]}, names, {})


def _with_language(connector: Mapping[str, list[str]], names: Collection[str], fixed: Mapping[str, Any]) -> Layout:
    wrapped = any(name.startswith("model.llm_backbone.llm.") for name in names)
    prefix = "model.llm_backbone.llm" if wrapped else "model.llm_backbone"
    language = {f"language.{part}.*": [f"{prefix}.backbone.{part}.*"] for part in ("embedding", "layers", "norm_f")}
    mamba2 = any(name.startswith(prefix) and name.endswith(".mixer.dt_bias") for name in names)
    mixer = {f"layers.0.mixer.{name}": value for name, value in MAMBA2.items()} if mamba2 else {}
    settings = {"norm_f.eps": 1e-5, "layers.0.norm.eps": 1e-5, **mixer}
    return Layout(
        part="model",
        rules={**connector, **language},
        tied={f"{prefix}.lm_head.weight": "language.embedding.weight"},
        absent=["encoders"],
        expects={**FEATURES, **fixed, **{f"language.{name}": value for name, value in settings.items()}},
    )
