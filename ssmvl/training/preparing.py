"""What a stage makes of a model before it trains it: parts frozen, and units that keep only their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch.utils.checkpoint import checkpoint

from ssmvl.language.mamba_lm import MambaLM
from ssmvl.training.stages import is_under
from ssmvl.vlm import VisionLanguageModel


def freeze_others(model: VisionLanguageModel, train: Sequence[str]) -> None:
    """Let the parameters under these prefixes have gradients, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(is_under(name, prefix) for prefix in train))


def checkpoint_activations(model: VisionLanguageModel | MambaLM) -> None:
    """Have each shard unit of a model keep only its inputs and compute its activations again in backward.

    Inside the unit's own hooks, so that what FSDP2 gathers for backward serves the second forward too.
    """
    for unit in model.shard_units():
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
