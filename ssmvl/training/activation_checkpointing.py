"""Activation checkpointing: units that keep only their inputs in forward."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from ssmvl.language.mamba_lm import MambaLM
from ssmvl.model.vlm import VisionLanguageModel


def checkpoint_activations(model: VisionLanguageModel | MambaLM) -> None:
    """Make each shard unit of a model keep only its inputs and recompute its activations in backward.

    The recomputation runs inside the unit's own hooks, so that it uses the parameters that FSDP2 gathers for backward.
    """
    for unit in model.shard_units():
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
