"""timm ViTs as encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, ImageSpec
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.processing.transforms import to_pixels
from ssmvl.testing import check_encoder
from ssmvl.vision.encoders import timm_encoder

Moved = Callable[[Any], Any]

PIXELS = torch.randint(256, (2, 3, 160, 160), dtype=torch.uint8)
SMALL = ["test_vit", "test_vit2", "test_vit3"]  # a class token; a register token; a register token and map pooling
DINO = "vit_large_patch14_reg4_dinov2.lvd142m"


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("model", [*SMALL, "vit_tiny_patch16_224"])
def test_features_equal_timms_second_to_last_block_without_prefix_tokens(model: str, moved: Moved) -> None:
    encoder = timm_encoder(model, image_size=160).eval()
    moved(encoder.vit)
    grid = encoder.grid
    assert grid == Grid(1, 10, 10)
    features = encoder(PIXELS)
    assert features.shape == (2, 100, encoder.width)
    (expected,) = encoder.vit.get_intermediate_layers(
        encoder.normalise(PIXELS), n=[len(encoder.vit.blocks) - 2], norm=False
    )
    torch.testing.assert_close(features, expected)
    (last,) = encoder.vit.get_intermediate_layers(encoder.normalise(PIXELS), n=1, norm=False)
    assert not torch.equal(features, last)


@pytest.mark.parametrize("model", SMALL)
def test_features_equal_those_of_the_blocks_called_one_by_one(model: str, moved: Moved) -> None:
    encoder = timm_encoder(model, image_size=160).eval()
    vit = moved(encoder.vit)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(encoder.normalise(PIXELS))))
    for block in list(vit.blocks)[:-1]:
        x = block(x)
    torch.testing.assert_close(encoder(PIXELS), x[:, -100:])


def test_satisfies_the_contract_of_encoders() -> None:
    check_encoder(lambda: timm_encoder("test_vit"))


@pytest.mark.parametrize(
    ("model", "size", "count", "width"),
    [(DINO, 384, 303_715_328, 1024), ("vit_so400m_patch14_siglip_384.webli", None, 428_225_600, 1152)],
)
def test_published_models_have_the_published_sizes(model: str, size: int | None, count: int, width: int) -> None:
    with torch.device("meta"):
        encoder = timm_encoder(model, image_size=size)
    assert parameters(encoder) == count
    assert (encoder.width, encoder.grid, encoder.image_spec) == (width, Grid(1, 27, 27), ImageSpec(384))
    assert not list(encoder.buffers())  # they would have no values after a build on meta


def test_clip_at_336_px_has_576_patches() -> None:
    with torch.device("meta"):
        encoder = timm_encoder("vit_large_patch14_clip_quickgelu_336.openai")
    assert (encoder.width, encoder.grid, encoder.image_spec) == (1024, Grid(1, 24, 24), ImageSpec(336))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_normalizes_in_full_precision_for_every_weight_dtype(dtype: torch.dtype) -> None:
    encoder = timm_encoder("test_vit", image_size=160).to(dtype)
    encoder.mean, encoder.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    exact = torch.promote_types(dtype, torch.float32)
    mean, std = (torch.tensor(v, dtype=exact).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    actual = encoder.normalise(PIXELS)
    assert actual.dtype == dtype
    assert torch.equal(actual, ((PIXELS.to(exact) / 255 - mean) / std).to(dtype))
    assert not list(encoder.buffers())


def test_the_tag_determines_mean_and_std() -> None:
    with torch.device("meta"):
        encoders = [timm_encoder(f"vit_large_patch14_clip_224.{tag}") for tag in ("laion2b", "dfn2b_s39b")]
    assert encoders[0].mean == encoders[0].std == (0.5, 0.5, 0.5)
    assert encoders[1].mean == (0.48145466, 0.4578275, 0.40821073)


def test_a_letterbox_has_the_encoders_mean_color() -> None:
    with torch.device("meta"):
        encoder = timm_encoder(DINO, image_size=28, resize="letterbox")
    assert encoder.image_spec == ImageSpec(28, "letterbox", (123, 116, 103))
    assert timm_encoder("test_vit", resize="resize-crop").image_spec == ImageSpec(160, "resize-crop")


def test_encoders_with_equal_specs_share_one_image() -> None:
    encoders = {"dino": timm_encoder("test_vit"), "siglip": timm_encoder("test_vit3")}
    encoders["siglip"].mean = (0.1, 0.2, 0.3)
    identity = nn.Identity()
    specs = VisionLanguageModel(encoders, identity, identity, identity).image_specs
    assert specs == (ImageSpec(160),)
    shared = {spec: to_pixels(Image.new("RGB", (40, 30)), spec)[None] for spec in specs}
    assert all(encoder(shared[encoder.image_spec]).shape[:2] == (1, 100) for encoder in encoders.values())


def test_zero_images_give_zero_features() -> None:
    features = timm_encoder("test_vit", image_size=160).to(torch.bfloat16)(PIXELS[:0])
    assert features.shape == (0, 100, 64)
    assert features.dtype == torch.bfloat16


def test_only_a_trained_encoder_builds_a_graph() -> None:
    encoder = timm_encoder("test_vit", image_size=160)
    assert encoder(PIXELS).requires_grad
    encoder.requires_grad_(False)
    assert not encoder(PIXELS).requires_grad


@pytest.mark.parametrize("model", ["test_vitt", "resnet18", "test_efficientnet", "hf-hub:timm/test_vit"])
def test_unknown_models_and_models_other_than_vits_are_rejected(model: str) -> None:
    not_a_vit = {"resnet18": "ResNet is not a ViT", "test_efficientnet": "EfficientNet is not a ViT"}
    with pytest.raises(ContractError, match=not_a_vit.get(model, rf"unknown timm model {model!r}\. Similar names: ")):
        timm_encoder(model)


def test_images_smaller_than_a_patch_are_rejected() -> None:
    with pytest.raises(ContractError, match="images of 15 px are smaller than one patch"):
        timm_encoder("test_vit", image_size=15)
