"""Weights of timm's ViTs: strict loading from files, directories and tags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from standalone_weights import load_weights
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from torch import nn

from ssmvl.checkpoints import hub, write_tensors
from ssmvl.errors import CheckpointError
from ssmvl.vision.encoders import VitEncoder, timm_encoder

AssertRejected = Callable[[nn.Module, str], None]
Moved = Callable[[Any], Any]

PIXELS = torch.randint(256, (2, 3, 160, 160), dtype=torch.uint8)
SMALL = ["test_vit", "test_vit2", "test_vit3"]  # a class token; a register token; a register token and map pooling


def test_weights_are_loaded_only_on_request(tmp_path: Path) -> None:
    source = timm_encoder("test_vit", image_size=160)
    write_tensors(tmp_path / "vit.safetensors", source.vit.state_dict())
    encoder = timm_encoder("test_vit", image_size=160, weights=str(tmp_path / "vit.safetensors"))
    before = encoder(PIXELS)
    assert not torch.equal(before, source(PIXELS))
    load_weights(encoder)
    assert torch.equal(encoder(PIXELS), source(PIXELS))


def test_without_weights_nothing_is_loaded() -> None:
    encoder = timm_encoder("test_vit")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    load_weights(encoder)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("size", [96, 176])
def test_positions_are_resampled_as_in_timm(tmp_path: Path, model: str, size: int, moved: Moved) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, moved(timm.create_model(model, num_classes=0, img_size=160)).state_dict())
    encoder = timm_encoder(model, image_size=size, weights=str(path))
    load_weights(encoder)
    overlay = {"file": str(path)}
    expected = timm.create_model(
        model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=size
    ).state_dict()
    actual = encoder.vit.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert actual["pos_embed"].shape[1] - (size // 16) ** 2 in (0, 1)


@pytest.fixture
def folder(tmp_path: Path, moved: Moved) -> Path:
    """A directory that timm saved for the Hub. Its weights include the classifier head."""
    save_for_hf(moved(timm.create_model("test_vit.r160_in1k")), str(tmp_path / "vit"), safe_serialization=True)
    return tmp_path / "vit"


def assert_holds(encoder: VitEncoder, path: Path) -> None:
    expected, actual = load_file(path), encoder.vit.state_dict()
    assert expected.keys() - actual.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


def test_reads_a_timm_directory_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", None)
    encoder = timm_encoder("test_vit.r160_in1k", weights=f"local-dir:{folder}")
    load_weights(encoder)
    assert_holds(encoder, folder / "model.safetensors")


@pytest.mark.parametrize(("model", "weights"), [("test_vit", "r160_in1k"), ("test_vit.r160_in1k", "r160_in1k")])
def test_a_tag_is_downloaded_when_weights_are_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, weights: str
) -> None:
    downloads: list[tuple[str, str]] = []

    def download(repo: str, name: str) -> str:
        downloads.append((repo, name))
        return str(folder / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    encoder = timm_encoder(model, weights=weights)
    assert not downloads
    load_weights(encoder)
    assert downloads == [("timm/test_vit.r160_in1k", "model.safetensors")]
    assert_holds(encoder, folder / "model.safetensors")


def test_without_a_network_a_tag_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo: str, name: str) -> str:
        raise LocalEntryNotFoundError(f"no {name} of {repo} in the cache")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    encoder = timm_encoder("test_vit", weights="r160_in1k")
    with pytest.raises(CheckpointError, match=r"model\.safetensors of timm/test_vit\.r160_in1k .* local-dir:DIRECTORY"):
        load_weights(encoder)


def test_missing_weights_name_the_file() -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        load_weights(timm_encoder("test_vit", image_size=160, weights="nowhere.safetensors"))


def test_a_truncated_file_is_rejected(folder: Path, assert_rejected: AssertRejected) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_rejected(timm_encoder("test_vit", weights=str(path)), r"model\.safetensors: cannot be read")


def test_missing_surplus_and_misshapen_tensors_are_listed(tmp_path: Path, assert_rejected: AssertRejected) -> None:
    path = tmp_path / "model.safetensors"
    tensors = timm.create_model("test_vit", num_classes=0).state_dict()
    tensors["blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    tensors["more.weight"] = torch.zeros(2)
    del tensors["blocks.1.norm1.bias"]
    write_tensors(path, tensors)
    encoder = timm_encoder("test_vit", weights=str(path))
    for match in (r"missing vit\.blocks\.1\.norm1\.bias", r"unexpected more\.weight", r"fc1\.bias\) is \(3,\)"):
        assert_rejected(encoder, rf"model\.safetensors does not fit[\s\S]*{match}")


def test_positions_that_cannot_be_resampled_are_rejected(tmp_path: Path, assert_rejected: AssertRejected) -> None:
    path = tmp_path / "model.safetensors"
    tensors = timm.create_model("test_vit", num_classes=0).state_dict()
    write_tensors(path, {**tensors, "pos_embed": torch.zeros(1, 12, 64)})
    assert_rejected(timm_encoder("test_vit", weights=str(path)), r"model\.safetensors: does not fit the model")


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "module.patch_embed.proj.weight"])
def test_other_patch_sizes_are_rejected(tmp_path: Path, name: str, assert_rejected: AssertRejected) -> None:
    path = tmp_path / "model.safetensors"
    tensors = timm.create_model("test_vit", num_classes=0).state_dict()
    write_tensors(path, tensors | {name: torch.zeros(64, 3, 32, 32)})
    encoder = timm_encoder("test_vit", weights=str(path))
    assert_rejected(
        encoder,
        rf"model\.safetensors: .*{name} has 32 x 32-pixel patches, but the encoder uses 16 x 16-pixel patches",
    )


def test_a_directory_without_safetensors_lists_its_files(folder: Path, assert_rejected: AssertRejected) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    encoder = timm_encoder("test_vit", weights=f"local-dir:{folder}")
    assert_rejected(encoder, r"vit/model\.safetensors: no such file .*vit contains config\.json, pytorch_model\.bin")


def test_a_missing_directory_is_rejected(tmp_path: Path, assert_rejected: AssertRejected) -> None:
    assert_rejected(
        timm_encoder("test_vit", weights=f"local-dir:{tmp_path / 'no'}"),
        r"no/model\.safetensors: no such file or directory",
    )


def test_a_directory_of_another_model_is_rejected(folder: Path, assert_rejected: AssertRejected) -> None:
    encoder = timm_encoder("test_vit2", weights=f"local-dir:{folder}")
    assert_rejected(encoder, "contains weights of 'test_vit', but the encoder is 'test_vit2'")


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_directory_with_other_statistics_is_rejected(
    folder: Path, name: str, assert_rejected: AssertRejected
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"][name] = [0.1, 0.2, 0.3]
    (folder / "config.json").write_text(json.dumps(config))
    encoder = timm_encoder("test_vit", weights=f"local-dir:{folder}")
    match = rf"next to it states .*{name} .*\(0\.1, 0\.2, 0\.3\).*no tag test_vit\.TAG has these values$"
    assert_rejected(encoder, match)


@pytest.mark.parametrize("tag", [None, "mine_v1", "augreg_in1k"])
def test_other_statistics_name_the_matching_tags(tmp_path: Path, tag: str | None) -> None:
    model = "vit_small_patch16_224"
    mean, std = (list(values) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    config = {"architecture": model, "pretrained_cfg": {"tag": tag, "mean": mean, "std": std}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / "model.safetensors", {"other": torch.zeros(1)})
    with torch.device("meta"):
        plain, right = (timm_encoder(name, weights=f"local-dir:{tmp_path}") for name in (model, f"{model}.dino"))
    with pytest.raises(CheckpointError, match=rf"write model: {model}\.TAG with one of dino$"):
        load_weights(plain)
    with pytest.raises(CheckpointError, match=r"missing vit\.blocks"):
        load_weights(right)


def with_args(folder: Path, **args: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = config.get("model_args", {}) | args
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (
            {"num_heads": 4},
            r"weights of test_vit with model_args \{.*'num_heads': 4.*:\n  .*num_heads is 2, the checkpoint needs 4",
        ),
        ({"act_layer": "quick_gelu"}, r"blocks\.0\.mlp\.act is 'GELU', the checkpoint needs 'QuickGELU'"),
        ({"norm_layer": "rmsnorm"}, r"is 'LayerNorm', the checkpoint needs 'RmsNorm'"),
        ({"num_head": 4}, r"config next to it does not describe such a model \(TypeError.*'num_head'"),
    ],
)
def test_a_directory_of_a_model_with_other_options_is_rejected(
    folder: Path, args: dict[str, Any], match: str, assert_rejected: AssertRejected
) -> None:
    assert_rejected(timm_encoder("test_vit", weights=f"local-dir:{with_args(folder, **args)}"), match)


@pytest.mark.parametrize(
    "args",
    [
        {"num_heads": 2, "act_layer": "gelu"},  # the defaults
        {"dynamic_img_size": False, "dynamic_img_pad": True},
        {"weight_init": "jax", "fix_init": True, "drop_rate": 0.1, "patch_drop_rate": 0.1},
        {"num_classes": 7},
        {"global_pool": "avg", "pool_include_prefix": True},
        {"global_pool": "map"},
        {"fc_norm": True},
        {"final_norm": False},
    ],
    ids=str,
)
def test_options_that_change_no_feature_are_accepted(tmp_path: Path, args: dict[str, Any], moved: Moved) -> None:
    vit = moved(timm.create_model("test_vit", **args)).eval()
    save_for_hf(vit, str(tmp_path), model_args=args, safe_serialization=True)
    encoder = timm_encoder("test_vit", weights=f"local-dir:{tmp_path}").eval()
    load_weights(encoder)
    (expected,) = vit.get_intermediate_layers(encoder.normalise(PIXELS), n=[len(vit.blocks) - 2])
    assert torch.equal(encoder(PIXELS), expected)


def test_a_directory_with_another_image_size_is_accepted(folder: Path) -> None:
    encoder = timm_encoder("test_vit", weights=f"local-dir:{with_args(folder, img_size=[320, 320])}")
    load_weights(encoder)
    assert_holds(encoder, folder / "model.safetensors")


def test_both_heads_of_a_distilled_model_are_dropped(tmp_path: Path) -> None:
    vit = timm.create_model("deit_tiny_distilled_patch16_224")
    write_tensors(tmp_path / "deit.safetensors", vit.state_dict())
    encoder = timm_encoder("deit_tiny_distilled_patch16_224", weights=str(tmp_path / "deit.safetensors"))
    load_weights(encoder)
    assert torch.equal(encoder.vit.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"architecture": "test_vit", "pretrained_cfg": 3}'])
def test_a_directory_with_an_invalid_config_is_rejected(
    folder: Path, text: str, assert_rejected: AssertRejected
) -> None:
    (folder / "config.json").write_text(text)
    assert_rejected(
        timm_encoder("test_vit", weights=f"local-dir:{folder}"), r"config\.json: |config next to it does not describe"
    )
