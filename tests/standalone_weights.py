"""Loading of an encoder's weights without a model around it."""

from __future__ import annotations

from typing import Any

from ssmvl.model.loading import open_weights


def load_weights(encoder: Any) -> None:
    """Load the pretrained weights that an encoder names into it."""
    if encoder.weights != "none":
        open_weights(encoder.weights, "encoder", getattr(encoder, "weights_layout", None)).load(encoder)
