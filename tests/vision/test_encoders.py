from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ssmvl
from ssmvl.checkpoints import write_tensors
from ssmvl.data.digits import CELLS, digit_images, draw
from ssmvl.errors import CheckpointError, ContractError
from ssmvl.interfaces import Grid
from ssmvl.vision.digit_vit import EMPTY, SHIPPED, VARIANTS, digit_vit
from ssmvl.vision.encoders import VitEncoder, timm_encoder

PIXELS = torch.randint(256, (2, 3, 160, 160), dtype=torch.uint8)


@pytest.mark.parametrize("model", ["test_vit", "vit_tiny_patch16_224"])
def test_features_are_timms_second_to_last_block_without_prefix_tokens(model: str) -> None:
    encoder = timm_encoder(model, image_size=160).eval()
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


def test_normalises_itself_with_the_models_mean_and_std() -> None:
    encoder = timm_encoder("test_vit", image_size=160)
    mean, std = (torch.tensor(encoder.vit.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(encoder.normalise(PIXELS), (PIXELS / 255 - mean) / std)


def test_no_image_gives_no_features() -> None:
    assert timm_encoder("test_vit", image_size=160)(PIXELS[:0]).shape == (0, 100, 64)


def test_frozen_encoder_keeps_no_graph_and_a_trained_one_does() -> None:
    encoder = timm_encoder("test_vit", image_size=160)
    assert encoder(PIXELS).requires_grad
    encoder.requires_grad_(False)
    assert not encoder(PIXELS).requires_grad


def test_weights_are_loaded_when_asked_and_not_before(tmp_path: Path) -> None:
    source = timm_encoder("test_vit", image_size=160)
    write_tensors(tmp_path / "vit.safetensors", source.vit.state_dict())
    encoder = timm_encoder("test_vit", image_size=160, weights=str(tmp_path / "vit.safetensors"))
    assert not torch.equal(encoder(PIXELS), source(PIXELS))
    encoder.load_weights()
    assert torch.equal(encoder(PIXELS), source(PIXELS))


def test_weights_that_are_missing_name_the_file() -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        timm_encoder("test_vit", image_size=160, weights="nowhere.safetensors").load_weights()


@pytest.mark.parametrize("model", ["test_vitt", "resnet18"])
def test_what_timm_lacks_or_is_no_vit_is_refused(model: str) -> None:
    with pytest.raises(ContractError, match=model if model == "test_vitt" else "ResNet is no ViT"):
        timm_encoder(model)


@pytest.fixture(scope="module")
def shipped() -> dict[str, VitEncoder]:
    model = ssmvl.build_model("quickstart", weights="recipe")
    return dict(model.encoders.items())


@pytest.mark.parametrize("stem", VARIANTS)
def test_every_tensor_of_a_built_encoder_is_the_shipped_one(shipped: dict[str, VitEncoder], stem: str) -> None:
    path = SHIPPED / f"digit_vit_{stem}.safetensors"
    assert path.stat().st_size < 2_000_000
    expected = load_file(path)
    found = shipped[stem].vit.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stem", VARIANTS)
def test_shipped_encoders_name_unseen_digits(shipped: dict[str, VitEncoder], stem: str) -> None:
    images, labels = digit_images("test")
    rng = np.random.default_rng(5)
    cells = rng.integers(CELLS, size=(len(labels), 2))
    pictures = [np.asarray(draw({(r, c): image})) for image, (r, c) in zip(images, cells.tolist(), strict=True)]
    encoder = shipped[stem].eval()
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        classes = encoder.vit(encoder.normalise(pixels)).argmax(-1)
    named = classes[torch.arange(len(labels)), torch.from_numpy(cells[:, 0] * CELLS + cells[:, 1])]
    assert (named == torch.from_numpy(labels)).float().mean() >= 0.97
    assert ((classes == EMPTY).sum(1) == CELLS * CELLS - 1).float().mean() > 0.9


def test_variants_share_one_input() -> None:
    assert {digit_vit(stem).image_spec for stem in VARIANTS} == {digit_vit("fine").image_spec}
