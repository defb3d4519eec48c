"""The two shipped encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from standalone_weights import load_weights

import ssmvl
from ssmvl.checkpoints import write_tensors
from ssmvl.data.scenes.digits import CELLS, digit_images, draw
from ssmvl.vision.digit_vit import EMPTY, SHIPPED, VARIANTS, digit_vit
from ssmvl.vision.encoders import VitEncoder


@pytest.fixture(scope="module")
def shipped() -> dict[str, VitEncoder]:
    model = ssmvl.build_model("quickstart", weights="recipe")
    return dict(model.encoders.items())


@pytest.mark.parametrize("stem", VARIANTS)
def test_every_tensor_of_a_built_encoder_equals_the_shipped_one(shipped: dict[str, VitEncoder], stem: str) -> None:
    path = SHIPPED / f"digit_vit_{stem}.safetensors"
    assert path.stat().st_size < 2_000_000
    expected = load_file(path)
    actual = shipped[stem].vit.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stem", VARIANTS)
def test_shipped_encoders_classify_unseen_digits(shipped: dict[str, VitEncoder], stem: str) -> None:
    images, labels = digit_images("test")
    rng = np.random.default_rng(5)
    cells = rng.integers(CELLS, size=(len(labels), 2))
    scenes = [np.asarray(draw({(r, c): image})) for image, (r, c) in zip(images, cells.tolist(), strict=True)]
    encoder = shipped[stem].eval()
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2)
        classes = encoder.vit(encoder.normalise(pixels)).argmax(-1)
    predicted = classes[torch.arange(len(labels)), torch.from_numpy(cells[:, 0] * CELLS + cells[:, 1])]
    assert (predicted == torch.from_numpy(labels)).float().mean() >= 0.97
    assert ((classes == EMPTY).sum(1) == CELLS * CELLS - 1).float().mean() > 0.9


def test_variants_share_one_input() -> None:
    assert {digit_vit(stem).image_spec for stem in VARIANTS} == {digit_vit("fine").image_spec}


def test_shipped_weights_can_be_omitted_or_replaced(tmp_path: Path) -> None:
    source = digit_vit("fine", weights="none")
    before = source.vit.state_dict()["pos_embed"].clone()
    load_weights(source)
    assert torch.equal(source.vit.state_dict()["pos_embed"], before)
    write_tensors(tmp_path / "vit.safetensors", source.vit.state_dict())
    encoder = digit_vit("fine", weights=str(tmp_path / "vit.safetensors"))
    load_weights(encoder)
    assert torch.equal(encoder.vit.state_dict()["pos_embed"], before)
