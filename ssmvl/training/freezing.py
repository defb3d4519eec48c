"""Which parameters a stage trains; all others are frozen."""

from __future__ import annotations

from collections.abc import Sequence

from ssmvl.model.vlm import VisionLanguageModel


def freeze_others(model: VisionLanguageModel, train: Sequence[str]) -> None:
    """Let the parameters under these prefixes have gradients, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(is_under(name, prefix) for prefix in train))


def is_under(name: str, prefix: str) -> bool:
    """Whether a parameter's name lies under a prefix of whole parts."""
    return name == prefix or name.startswith(prefix + ".")
