"""Valid values and combinations of `weights` and tags of timm's ViTs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from standalone_weights import load_weights

from ssmvl.checkpoints import write_tensors
from ssmvl.errors import CheckpointError, ContractError
from ssmvl.vision.encoders import timm_encoder


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ("vit.pt", "a pickle can run arbitrary code"),
        ("r160_in1", "or a tag of 'test_vit', received 'r160_in1'. Did you mean 'r160_in1k'"),
        ("local-dir:", "or a tag of 'test_vit', received 'local-dir:'"),
    ],
)
def test_invalid_weights_are_rejected(weights: str, match: str) -> None:
    with pytest.raises(ContractError, match=match):
        timm_encoder("test_vit", weights=weights)


def test_unknown_and_conflicting_tags_are_rejected() -> None:
    with pytest.raises(ContractError, match=r"Invalid pretrained tag \(x\).*its tags: r160_in1k"):
        timm_encoder("test_vit.x")
    with pytest.raises(ContractError, match="name different tags"):
        timm_encoder("vit_base_patch32_clip_224.laion2b", weights="datacompxl")


def test_a_tag_with_only_a_pickle_is_rejected() -> None:
    with torch.device("meta"), pytest.raises(ContractError, match=r"only as a pickle.*\.pth\.tar"):
        timm_encoder("vit_huge_patch14_gap_224", weights="in1k_ijepa")


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("vit_large_patch14_clip_336", "openai"),
        ("vit_large_patch14_clip_336.openai", "none"),
        ("vit_large_patch14_clip_336.openai", "clip.safetensors"),
    ],
)
def test_weights_that_need_quickgelu_name_the_model_that_has_it(model: str, weights: str) -> None:
    with pytest.raises(ContractError, match=r"write model: vit_large_patch14_clip_quickgelu_336\.openai"):
        timm_encoder(model, weights=weights)


def test_a_directory_of_quickgelu_weights_fits_only_the_quickgelu_model(tmp_path: Path) -> None:
    config = {"architecture": "vit_base_patch32_clip_224", "pretrained_cfg": {"tag": "openai"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / "model.safetensors", {"other": torch.zeros(1)})
    names = ("vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224")
    with torch.device("meta"):
        plain, quick = (timm_encoder(name, weights=f"local-dir:{tmp_path}") for name in names)
    with pytest.raises(CheckpointError, match=f"contains weights of '{names[1]}', but the encoder is '{names[0]}'"):
        load_weights(plain)
    with pytest.raises(CheckpointError, match=r"missing vit\.blocks"):
        load_weights(quick)
    config["pretrained_cfg"] = {"tag": "laion2b"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"contains weights of '{names[0]}', but the encoder is '{names[1]}'"):
        load_weights(quick)


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("vit_base_patch16_224", r"vit_base_patch16_224\.TAG with one of .*augreg_in21k"),  # mean and std
        ("vit_large_patch14_clip_336", r"vit_large_patch14_clip_336\.TAG with one of .*openai"),  # QuickGELU too
    ],
)
def test_a_file_needs_the_tag_if_tags_differ(name: str, tags: str) -> None:
    match = rf"tags of '{name}' differ in mean, std or QuickGELU, and a\.safetensors does not state .* model: {tags}"
    with torch.device("meta"):
        with pytest.raises(ContractError, match=match):
            timm_encoder(name, weights="a.safetensors")
        assert timm_encoder(name).mean
        tag = timm.get_pretrained_cfg(name).tag
        assert timm_encoder(f"{name}.{tag}", weights="a.safetensors").mean


def test_a_file_needs_no_tag_if_all_tags_agree() -> None:
    with torch.device("meta"):
        encoder = timm_encoder("vit_large_patch14_clip_quickgelu_336", weights="a.safetensors")
    assert encoder.mean[0] == pytest.approx(0.48145466)
