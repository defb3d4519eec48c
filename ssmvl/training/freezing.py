"""Freezing of the parameters that a stage does not train."""

from __future__ import annotations

from collections.abc import Sequence

from ssmvl.model.vlm import VisionLanguageModel


def freeze_others(model: VisionLanguageModel, train: Sequence[str]) -> None:
    """Freeze all parameters except those under these prefixes."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(is_under(name, prefix) for prefix in train))


def is_under(name: str, prefix: str) -> bool:
    """Return True if a parameter's name is `prefix`, or starts with it and a dot."""
    return name == prefix or name.startswith(prefix + ".")
