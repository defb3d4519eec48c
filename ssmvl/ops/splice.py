"""Copy visual tokens into text embeddings at the image places."""

from __future__ import annotations

from torch import Tensor

from ssmvl.errors import ShapeError


def splice(embeds: Tensor, visual: Tensor, positions: Tensor) -> Tensor:
    """Copy `visual` into `embeds` at flat `positions`.

    Args:
        embeds: (B, T, D) text embeddings; those at `positions` are replaced in the result.
        visual: (I, M, D) visual tokens, cast to the dtype of `embeds`.
        positions: (I*M,) int64 indices into the flattened (B*T), in the order of the images.

    Raises:
        ShapeError: the number of visual tokens differs from the number of image places.
    """
    require_filled(visual, positions)
    flat = embeds.flatten(0, 1).index_copy(0, positions, visual.flatten(0, 1).to(embeds.dtype))
    return flat.view_as(embeds)


def require_filled(visual: Tensor, positions: Tensor) -> None:
    """Check that there are as many image places as visual tokens.

    Args:
        visual: (I, M, D).
        positions: (I*M,).

    Raises:
        ShapeError: there are more or fewer.
    """
    if visual.shape[0] * visual.shape[1] != positions.shape[0]:
        raise ShapeError(
            f"{visual.shape[0]} images of {visual.shape[1]} visual tokens do not fill {positions.shape[0]} image "
            "places; each image needs exactly as many image places as the connector produces tokens"
        )
