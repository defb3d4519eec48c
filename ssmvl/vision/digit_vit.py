"""The quickstart's encoders: two small ViTs for handwritten digits, shipped with the package.

`scripts/make_digit_encoders.py` trained their weights, on training digits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssmvl.vision.encoders import VitEncoder

SIZE, CELLS, EMPTY = 48, 3, 10  # pixels per side, cells per side, and the class of a cell without a digit
SHIPPED = Path(__file__).parent / "weights"


class _Variant(NamedTuple):
    channels: Sequence[int]  # output channels of the stem's convolutions before the last
    mean: float
    std: float


VARIANTS = {"fine": _Variant((16, 32, 64), 0.5, 0.5), "coarse": _Variant((24, 32), 0.0, 1.0)}


class ConvStem(nn.Module):
    """Convolutions instead of a patch embedding: each but the last halves the side, the last yields one patch per cell.

    Args:
        channels: output channels of the convolutions before the last.
        img_size: side in pixels.
        patch_size: side of a cell in pixels.
        embed_dim: D.
    """

    def __init__(self, channels: Sequence[int], img_size: int, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for in_channels, out_channels in zip((3, *channels), channels, strict=False):
            layers += [nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), nn.GELU()]
        kernel = patch_size // 2 ** len(channels)
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], embed_dim, kernel, stride=kernel))
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """X (I, 3, S, S) -> (I, N, D)."""
        return self.layers(x).flatten(2).transpose(1, 2)


def digit_vit(stem: Literal["fine", "coarse"], *, weights: str = "shipped") -> VitEncoder:
    """A ViT of width 128 on 48 x 48 px with 3 x 3 patches, trained to classify the digit in each cell.

    Args:
        stem: selects the encoder; the two differ in their convolutional stem and in their mean and std.
        weights: `shipped`, `none`, or a safetensors file of the same layout.
    """
    variant = VARIANTS[stem]

    def embed(img_size: int, patch_size: int, embed_dim: int, **_: object) -> ConvStem:
        return ConvStem(variant.channels, img_size, patch_size, embed_dim)

    vit = VisionTransformer(
        img_size=SIZE,
        patch_size=SIZE // CELLS,
        embed_dim=128,
        depth=3,
        num_heads=4,
        mlp_ratio=2,
        num_classes=EMPTY + 1,
        class_token=False,
        global_pool="",
        embed_layer=embed,
    )
    path = str(SHIPPED / f"digit_vit_{stem}.safetensors") if weights == "shipped" else weights
    return VitEncoder(vit, size=SIZE, mean=[variant.mean] * 3, std=[variant.std] * 3, weights=path)
