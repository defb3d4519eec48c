"""Activation checkpointing: units that keep only their inputs in forward."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from ssmvl.language.mamba_lm import MambaLM
from ssmvl.model.vlm import VisionLanguageModel


def checkpoint_activations(model: VisionLanguageModel | MambaLM) -> None:
    """Have each shard unit of a model keep only its inputs and compute its activations again in backward.

    Inside the unit's own hooks, so that what FSDP2 gathers for backward serves the second forward too.
    """
    for unit in model.shard_units():
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
