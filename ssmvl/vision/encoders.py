"""Vision encoders: uint8 pixels -> patch features of a ViT's second-to-last block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssmvl.checkpoints import load_into
from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, ImageSpec


class VitEncoder(nn.Module):
    """Patch features of a timm VisionTransformer: second-to-last block, no final norm, prefix tokens dropped.

    Args:
        vit: a timm `VisionTransformer` with at least two blocks.
        size: side of its input in pixels.
        mean: per channel, of pixels in 0…1.
        std: per channel, of pixels in 0…1.
        weights: a safetensors file that `load_weights` reads; None to keep the initial weights.

    Source: ML-Mamba §3.2 and Prismatic VLMs (arXiv 2402.07865) §3: second-to-last layer.
    """

    vit: Any  # what timm's VisionTransformer offers is typed as Tensor | Module
    mean: Tensor
    std: Tensor

    def __init__(
        self, vit: Any, *, size: int, mean: Sequence[float], std: Sequence[float], weights: str | None
    ) -> None:
        super().__init__()
        if len(getattr(vit, "blocks", ())) < 2 or not hasattr(vit, "forward_intermediates"):
            raise ContractError(
                f"{type(vit).__name__} is no ViT of two blocks or more; features come from the last but one"
            )
        self.vit = vit
        self.width = int(vit.embed_dim)
        self.grid = Grid(1, *vit.patch_embed.grid_size)
        self.image_spec = ImageSpec(size)
        self._weights = weights
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 (I, 3, S, S) -> (I, N, D), in the dtype of the weights; without gradients where it is frozen."""
        if not len(pixels):  # timm reshapes by the number of images
            return self.normalise(pixels).new_empty(0, self.grid.length, self.width)
        trained = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            (features,) = self.vit.forward_intermediates(
                self.normalise(pixels),
                indices=[len(self.vit.blocks) - 2],
                norm=False,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        return features

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (I, 3, S, S) -> what the ViT takes, in the dtype of its weights."""
        scaled = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        return scaled.to(next(self.vit.parameters()).dtype)

    def load_weights(self) -> None:
        """Load the safetensors file named by `weights`.

        Raises:
            CheckpointError: the file is missing or does not fit.
        """
        if self._weights is not None:
            load_into(self.vit, Path(self._weights).expanduser())

    def shard_units(self) -> Sequence[nn.Module]:
        """The encoder as a whole."""
        return [self]


def timm_encoder(model: str, *, image_size: int | None = None, weights: str | None = None) -> VitEncoder:
    """Any ViT of timm, by its name there; mean and std are the model's own. Nothing is downloaded.

    Args:
        model: a name of timm's own, e.g. `vit_large_patch14_reg4_dinov2.lvd142m`.
        image_size: side in pixels; the model's own if None.
        weights: a safetensors file with the state dict of timm's model without its classifier.

    Raises:
        ContractError: timm has no such model, or it is no ViT.
    """
    if ":" in model:
        raise ContractError(f"{model!r}: write a name of timm's own; models in a hub or a folder are not read")
    options = {} if image_size is None else {"img_size": image_size}
    try:
        vit = timm.create_model(model, pretrained=False, num_classes=0, **options)
    except (RuntimeError, TypeError) as error:
        close = ", ".join(timm.list_models(f"*{model.split('.')[0]}*")[:5]) or "none"
        raise ContractError(f"timm cannot build {model!r} ({error}); similar names there: {close}") from error
    config = vit.pretrained_cfg
    size = image_size or config["input_size"][-1]
    return VitEncoder(vit, size=size, mean=config["mean"], std=config["std"], weights=weights)
