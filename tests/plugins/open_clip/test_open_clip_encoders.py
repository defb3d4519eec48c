"""open_clip vision towers as encoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from ssmvl_open_clip.encoders import ClipEncoder, open_clip_encoder
from standalone_weights import load_weights
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssmvl.checkpoints import write_tensors
from ssmvl.errors import ContractError
from ssmvl.interfaces import Grid, ImageSpec
from ssmvl.recipes.binding import bind_part
from ssmvl.testing import check_encoder
from ssmvl.vision.encoders import VitEncoder, timm_encoder

Written = Callable[[str], Path]
Whole = Callable[[str], Any]
Loaded = Callable[..., Any]

SIZE, PATCH, WIDTH, LAYERS, HEADS = 64, 16, 32, 4, 2
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
NAMES = ("small-clip", "small-clip-quickgelu", "small-siglip", "small-trunk")
pytestmark = pytest.mark.usefixtures("small_models")


def images(size: int) -> Tensor:
    return torch.randint(256, (2, 3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["small-clip", "small-clip-quickgelu"])
def test_clip_in_open_clip_equals_clip_in_timm(name: str, written: Written, loaded: Loaded) -> None:
    path = written(name)
    encoder = loaded(name, path)
    vit = VisionTransformer(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=0,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        act_layer="quick_gelu" if name.endswith("quickgelu") else "gelu",
    )
    timm_clip = VitEncoder(vit, size=SIZE, mean=encoder.mean, std=encoder.std, weights=str(path))
    load_weights(timm_clip)
    pixels = images(SIZE)
    features = encoder(pixels)
    assert features.shape == (2, 16, WIDTH)
    torch.testing.assert_close(features, timm_clip.eval()(pixels), rtol=1e-4, atol=1e-5)


def test_quickgelu_changes_the_features(written: Written, loaded: Loaded) -> None:
    path, pixels = written("small-clip"), images(SIZE)
    plain, quick = (loaded(name, path)(pixels) for name in ("small-clip", "small-clip-quickgelu"))
    assert (plain - quick).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "model"), [("small-siglip", "test_vit3"), ("small-trunk", "test_vit2")])
def test_timm_trunks_equal_timm_encoders(
    tmp_path: Path, name: str, model: str, written: Written, loaded: Loaded
) -> None:
    path = written(name)
    encoder = loaded(name, path)
    assert isinstance(encoder, VitEncoder)
    trunk = {k.removeprefix("visual.trunk."): t for k, t in load_file(path).items() if k.startswith("visual.trunk.")}
    write_tensors(tmp_path / "timm.safetensors", trunk)
    expected = timm_encoder(model, weights=str(tmp_path / "timm.safetensors"))
    assert encoder.vit.state_dict().keys() == trunk.keys()
    load_weights(expected)
    pixels = images(160)
    expected.mean, expected.std = encoder.mean, encoder.std
    assert torch.equal(encoder(pixels), expected.eval()(pixels))


@pytest.mark.parametrize("name", NAMES)
def test_satisfies_the_contract_of_encoders(name: str) -> None:
    check_encoder(lambda: open_clip_encoder(name))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_vision_tower_is_kept(name: str, whole: Whole) -> None:
    encoder = open_clip_encoder(name)
    tower = whole(name).visual
    expected = (
        {f"vit.{k}" for k in tower.trunk.state_dict()}
        if hasattr(tower, "trunk")
        else {f"visual.{k}" for k in tower.state_dict()}
    )
    assert encoder.state_dict().keys() == expected
    assert not list(encoder.buffers())


@pytest.mark.parametrize(
    ("name", "count", "width", "spec", "grid"),
    [
        ("ViT-L-14-336-quickgelu", 304_293_888, 1024, ImageSpec(336), Grid(1, 24, 24)),
        ("ViT-SO400M-14-SigLIP-384", 428_225_600, 1152, ImageSpec(384), Grid(1, 27, 27)),
        ("ViT-SO400M-14-SigLIP2-378", 428_225_600, 1152, ImageSpec(378), Grid(1, 27, 27)),
    ],
)
def test_published_sizes_build_on_meta(name: str, count: int, width: int, spec: ImageSpec, grid: Grid) -> None:
    with torch.device("meta"):
        encoder = open_clip_encoder(name)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == count
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert (encoder.width, encoder.image_spec, encoder.grid) == (width, spec, grid)


def test_no_full_size_text_tower_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    init = nn.Embedding.__init__

    def count(self: nn.Embedding, num_embeddings: int, embedding_dim: int, **options: Any) -> None:
        sizes.append(num_embeddings * embedding_dim)
        init(self, num_embeddings, embedding_dim, **options)

    monkeypatch.setattr(nn.Embedding, "__init__", count)
    open_clip_encoder("small-siglip")
    assert sum(sizes) <= 1


@pytest.mark.parametrize(
    ("model", "weights", "mean"),
    [
        ("ViT-L-14", "none", CLIP_MEAN),
        ("ViT-L-14:laion2b_s32b_b82k", "none", (0.5, 0.5, 0.5)),
        ("ViT-L-14", "laion2b_s32b_b82k", (0.5, 0.5, 0.5)),
        ("ViT-B-16-SigLIP", "a.safetensors", (0.5, 0.5, 0.5)),
        ("small-clip", "none", CLIP_MEAN),
    ],
)
def test_mean_and_std_are_those_of_the_tag_or_of_the_first_tag(
    model: str, weights: str, mean: tuple[float, ...]
) -> None:
    with torch.device("meta"):
        assert open_clip_encoder(model, weights=weights).mean == mean


def test_a_letterbox_has_the_encoders_mean_color() -> None:
    spec = open_clip_encoder("small-clip", resize="letterbox", image_size=96).image_spec
    assert spec == ImageSpec(96, "letterbox", (122, 116, 104))


def test_features_of_clip_equal_the_second_to_last_block_without_the_class_token(
    written: Written, loaded: Loaded
) -> None:
    encoder = loaded("small-clip", written("small-clip"))
    assert isinstance(encoder, ClipEncoder)
    tower, pixels = encoder.visual, images(SIZE)
    x = tower.conv1(encoder.normalise(pixels)).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_embedding.expand(2, 1, -1), x], 1) + tower.positional_embedding
    x = tower.ln_pre(x)
    for block in tower.transformer.resblocks[:-1]:
        x = block(x)
    torch.testing.assert_close(encoder(pixels), x[:, 1:])


def test_bf16_and_zero_images(written: Written, loaded: Loaded) -> None:
    encoder = loaded("small-clip", written("small-clip"))
    exact = encoder(images(SIZE)[:0])
    assert exact.shape == (0, 16, WIDTH)
    pixels = images(SIZE)
    expected = encoder(pixels)
    actual = encoder.to(torch.bfloat16)(pixels)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        ("small-clp", {}, r"unknown open_clip model 'small-clp'\. Similar names: small-clip"),
        ("local-dir:/a", {}, "unknown open_clip model 'local-dir'"),
        ("small-clip:mine", {}, "unknown tag 'mine' of open_clip model 'small-clip'"),
        ("ViT-L-14:openai", {"weights": "laion2b_s32b_b82k"}, "name different tags"),
        (
            "ViT-L-14",
            {"weights": "laion2b_s32b"},
            r"or a tag of 'ViT-L-14', received 'laion2b_s32b'\. Did you mean 'laion2b_s32b_b82k'",
        ),
        ("ViT-L-14", {"weights": "clip.pt"}, "a pickle can run arbitrary code"),
        ("ViTamin-S", {"weights": "datacomp1b"}, "only as a pickle"),
        ("RN50", {}, "ModifiedResNet is not a ViT"),
        ("convnext_base", {}, "ConvNeXt is not a ViT"),
        ("small-clip", {"image_size": 15}, "images of 15 px are smaller than one patch"),
    ],
)
def test_invalid_models_and_options_are_rejected(model: str, options: dict[str, Any], match: str) -> None:
    with torch.device("meta"), pytest.raises(ContractError, match=match):
        open_clip_encoder(model, **options)


@pytest.mark.parametrize(("name", "model"), [("open_clip", "ViT-L-14-336-quickgelu"), ("timm", "test_vit")])
def test_options_of_a_recipe(name: str, model: str) -> None:
    node = {"name": name, "model": model, "image_size": 96, "resize": "resize-crop", "weights": "none"}
    bound, problems = bind_part(node, "encoder", "model.encoders.a")
    assert not problems
    with torch.device("meta"):
        assert bound().image_spec == ImageSpec(96, "resize-crop")
    _, problems = bind_part({**node, "resize": "squash", "image_size": 0}, "encoder", "model.encoders.a")
    assert [problem.path for problem in problems] == ["model.encoders.a.image_size", "model.encoders.a.resize"]
