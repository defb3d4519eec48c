"""timm's model families: features, error messages for unsupported models, and lower precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from ssmvl_open_clip.encoders import open_clip_encoder
from standalone_weights import load_weights

from ssmvl.errors import ContractError, RecipeError
from ssmvl.interfaces import Grid
from ssmvl.model.build import build_model
from ssmvl.vision.digit_vit import digit_vit
from ssmvl.vision.encoders import NEVER_RUN, VitEncoder, timm_encoder

Moved = Callable[[Any], Any]

FAMILIES = [
    "test_vit_relpos",
    "deit_tiny_distilled_patch16_224",  # two prefix tokens
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",  # five
    "convit_tiny",
    "cait_xxs24_224",
    "vit_tiny_r_s16_p8_224",
]


@pytest.mark.parametrize("model", FAMILIES)
def test_features_equal_timms_map_of_the_second_to_last_block(model: str, moved: Moved) -> None:
    encoder = timm_encoder(model, image_size=96).eval()
    vit = moved(encoder.vit)
    pixels = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    last = len(vit.blocks) - 2
    maps = vit.forward_intermediates(encoder.normalise(pixels), indices=[last], norm=False, intermediates_only=True)[0]
    assert Grid(1, *maps.shape[2:]) == encoder.grid
    features = encoder(pixels)
    assert features.isfinite().all()
    assert torch.equal(features, maps.flatten(2).transpose(1, 2))
    for name in NEVER_RUN:
        if hasattr(vit, name):
            setattr(vit, name, None)
    assert torch.equal(encoder(pixels), features)


@pytest.mark.parametrize(
    "model",
    ["beit_base_patch16_224", "flexivit_base", "deepseek_vit_412m_enc", "qwen3_vit_88m_enc", "vitamin_base_224"],
)
def test_other_families_have_a_square_grid(model: str) -> None:
    with torch.device("meta"):
        encoder = timm_encoder(model)
        pixels = torch.zeros(2, 3, encoder.image_spec.size, encoder.image_spec.size, dtype=torch.uint8)
        assert encoder(pixels).shape == (2, encoder.grid.rows**2, encoder.width)


@pytest.mark.parametrize(
    ("model", "size", "match"),
    [
        ("samvit_base_patch16", None, "VisionTransformerSAM on images of 1024 x 1024 px fails .* must be NCHW"),
        (
            "vit_base_patch16_sapiens2",
            None,
            r"of 768 x 768 px outputs \(1, 2304, 768\), but its grid is 64 x 48 with width 768;",
        ),
        ("test_vit", 101, r"101 x 101 px fails \(.*divisible by patch size \(16\)\.\); use another image_size"),
        ("vit_tiny_r_s16_p8_224", 101, r"for images of 101 px \(AssertionError"),
        ("davit_tiny", 96, "unexpected keyword argument 'img_size'"),
        ("davit_tiny", None, "DaVit is not a ViT"),
        ("levit_128s", None, "LevitDistilled is not a ViT"),
        ("mvitv2_tiny", None, "MultiScaleVit is not a ViT"),
        ("hiera_tiny_224", None, "Hiera is not a ViT"),
        ("naflexvit_base_patch16_gap", None, "NaFlexVit is not a ViT"),
    ],
)
def test_a_model_that_cannot_run_is_rejected_when_built(model: str, size: int | None, match: str) -> None:
    with torch.device("meta"), pytest.raises(ContractError, match=match):
        timm_encoder(model, image_size=size)


def test_the_check_on_meta_does_not_modify_the_encoder() -> None:
    with torch.device("meta"):
        encoder = timm_encoder("convit_tiny", image_size=64)  # its blocks cache tables
    assert {tuple(table.shape) for table in encoder.buffers()} == {(1, 1, 1, 3)}


def test_building_a_model_checks_its_encoders() -> None:
    with pytest.raises(RecipeError, match=r"model\.encoders\.fine: .* 101 x 101 px fails"):
        build_model("quickstart", "model.encoders.fine={name: timm, model: test_vit, image_size: 101}")


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize(
    "build",
    [
        *(partial(timm_encoder, name) for name in ("test_vit", "test_vit3", "qwen3_vit_88m_enc")),
        *(partial(open_clip_encoder, name) for name in ("small-clip", "small-clip-quickgelu", "small-siglip")),
        partial(digit_vit, "fine"),
    ],
    ids=lambda build: str(build.args[0]),
)
def test_bf16_and_autocast_are_close_to_fp32_in_the_dtype_of_the_weights(build: Callable[..., VitEncoder]) -> None:
    encoder = (build(image_size=64) if build.args[0].startswith("qwen3") else build()).eval().requires_grad_(False)
    load_weights(encoder)
    size = encoder.image_spec.size
    pixels = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    exact = encoder(pixels)
    cast = {}
    with torch.autocast("cpu", torch.bfloat16):
        cast["autocast"], empty = encoder(pixels), encoder(pixels[:0])
    assert cast["autocast"].dtype == empty.dtype == torch.float32
    assert not torch.equal(cast["autocast"], exact)
    encoder.to(torch.bfloat16)
    cast["bf16"] = encoder(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        cast["both"] = encoder(pixels)
    assert cast["bf16"].dtype == cast["both"].dtype == torch.bfloat16
    for how, features in cast.items():
        assert features.isfinite().all(), how
        assert (features.float() - exact).abs().max() < 0.03 * exact.abs().max(), how
