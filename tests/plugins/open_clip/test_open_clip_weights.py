"""Weights of open_clip's towers: strict loading from files, directories and tags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from ssmvl_open_clip.encoders import open_clip_encoder
from standalone_weights import load_weights
from torch import Tensor, nn
from torch.nn import functional as F

from ssmvl.checkpoints import hub, write_tensors
from ssmvl.errors import CheckpointError, ContractError
from ssmvl.interfaces import Grid

AssertRejected = Callable[[nn.Module, str], None]
Written = Callable[[str], Path]
Loaded = Callable[..., Any]

SIZE, PATCH, WIDTH = 64, 16, 32
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
pytestmark = pytest.mark.usefixtures("small_models")


def images(size: int) -> Tensor:
    return torch.randint(256, (2, 3, size, size), dtype=torch.uint8)


def change_config(directory: Path, part: str, **values: Any) -> None:
    path = directory / "open_clip_config.json"
    config = json.loads(path.read_text())
    section = config
    for key in filter(None, part.split(".")):
        section = section[key]
    section.update(values)
    path.write_text(json.dumps(config))


@pytest.fixture
def tagged(monkeypatch: pytest.MonkeyPatch) -> str:
    """A small model whose tags differ in mean, std and QuickGELU."""
    halves = {"mean": HALF, "std": HALF}
    tags: dict[str, Any] = {"default": {}, "halves": halves, "quick": {**halves, "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-clip", tags)
    return "small-clip"


@pytest.mark.parametrize("size", [48, 64, 96])
def test_positions_of_clip_are_resampled_as_in_open_clip(size: int, written: Written, loaded: Loaded) -> None:
    path = written("small-clip")
    encoder = loaded("small-clip", path, image_size=size)
    side = size // PATCH
    assert encoder.grid == Grid(1, side, side)
    own = load_file(path)["visual.positional_embedding"]
    grid = own[1:].T.unflatten(1, (4, 4))[None]
    if size != SIZE:
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
    expected = torch.cat([own[:1], grid[0].flatten(1).T])
    torch.testing.assert_close(encoder.visual.positional_embedding, expected, rtol=0, atol=0)
    assert encoder(images(size)).shape == (2, side * side, WIDTH)


def test_positions_of_a_trunk_are_resampled_as_in_timm(written: Written, loaded: Loaded) -> None:
    path = written("small-siglip")
    encoder = loaded("small-siglip", path, image_size=96)
    overlay = {"file": str(path)}
    expected = timm.create_model(
        "test_vit3", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=96
    ).state_dict()
    actual = encoder.vit.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert encoder(images(96)).shape == (2, 36, 96)


def test_weights_are_loaded_only_on_request(written: Written) -> None:
    path, pixels = written("small-clip"), images(SIZE)
    encoder = open_clip_encoder("small-clip", weights=str(path)).eval()
    before = encoder(pixels)
    expected = {key: tensor for key, tensor in load_file(path).items() if key.startswith("visual.")}
    load_weights(encoder)
    assert not torch.equal(encoder(pixels), before)
    assert encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in encoder.state_dict().items())
    plain = open_clip_encoder("small-clip").eval()
    before = plain(pixels)
    load_weights(plain)
    assert torch.equal(plain(pixels), before)


@pytest.fixture(params=["small-clip", "small-siglip"])
def folder(tmp_path: Path, request: pytest.FixtureRequest, written: Written) -> tuple[str, Path]:
    """A model's name, and a directory as open_clip writes it for the Hub."""
    name, directory = request.param, tmp_path / "folder"
    directory.mkdir()
    written(name).rename(directory / "open_clip_model.safetensors")
    (directory / "open_clip_pytorch_model.bin").write_bytes(b"pickles are not read")
    config = open_clip.get_model_config(name)
    config["vision_cfg"].setdefault("mlp_ratio", 4.0)  # a default that configs may state or omit
    preprocess = {"mean": list(CLIP_MEAN), "std": [0.26862954, 0.26130258, 0.27577711]}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return name, directory


def test_reads_a_directory_without_a_network(
    folder: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, loaded: Loaded
) -> None:
    name, directory = folder
    monkeypatch.setattr(hub, "hf_hub_download", None)
    encoder = open_clip_encoder(name, weights=f"local-dir:{directory}").eval()
    load_weights(encoder)
    pixels = images(encoder.image_spec.size)
    assert torch.equal(encoder(pixels), loaded(name, directory / "open_clip_model.safetensors")(pixels))


def test_a_directory_of_another_model_is_rejected(folder: tuple[str, Path], assert_rejected: AssertRejected) -> None:
    name, directory = folder
    encoder = open_clip_encoder(name, weights=f"local-dir:{directory}")
    change_config(directory, "model_cfg.vision_cfg", head_width=8)
    change_config(directory, "model_cfg", quick_gelu=True)
    match = "contains weights of another model: quick_gelu is True, but .* has False; vision_cfg.head_width is 8"
    assert_rejected(encoder, match)


def test_a_directory_with_another_image_size_and_dropout_is_accepted(folder: tuple[str, Path]) -> None:
    name, directory = folder
    change_config(
        directory, "model_cfg.vision_cfg", image_size=500, patch_dropout=0.5, timm_drop=0.1, timm_drop_path=0.1
    )
    encoder = open_clip_encoder(name, weights=f"local-dir:{directory}", image_size=80)
    load_weights(encoder)
    assert encoder.grid == Grid(1, 5, 5)


def test_a_directory_with_other_statistics_is_rejected(
    folder: tuple[str, Path], assert_rejected: AssertRejected
) -> None:
    name, directory = folder
    change_config(directory, "preprocess_cfg", mean=[0.5, 0.5, 0.5])
    encoder = open_clip_encoder(name, weights=f"local-dir:{directory}")
    assert_rejected(
        encoder, rf"config next to it states mean \(0\.5, 0\.5, 0\.5\).*no tag {name}:TAG has these values$"
    )


def test_other_statistics_name_the_matching_tags(folder: tuple[str, Path], tagged: str) -> None:
    directory = folder[1]
    config = {"model_cfg": open_clip.get_model_config(tagged), "preprocess_cfg": {"mean": HALF, "std": HALF}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    encoder = open_clip_encoder(tagged, weights=f"local-dir:{directory}")
    with pytest.raises(CheckpointError, match=f"write model: {tagged}:TAG with one of halves$"):
        load_weights(encoder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_cfg": 3}', '{"model_cfg": {"vision_cfg": {"x": 1}}}'])
def test_a_directory_with_an_invalid_config_is_rejected(
    folder: tuple[str, Path], text: str, assert_rejected: AssertRejected
) -> None:
    name, directory = folder
    (directory / "open_clip_config.json").write_text(text)
    assert_rejected(
        open_clip_encoder(name, weights=f"local-dir:{directory}"),
        r"open_clip_config\.json(: | must be in)|config next to it does not describe",
    )


def test_a_directory_without_safetensors_is_rejected(folder: tuple[str, Path], assert_rejected: AssertRejected) -> None:
    name, directory = folder
    (directory / "open_clip_model.safetensors").unlink()
    encoder = open_clip_encoder(name, weights=f"local-dir:{directory}")
    assert_rejected(encoder, r"open_clip_model\.safetensors: no such file .*contains .*open_clip_pytorch_model\.bin")


@pytest.mark.parametrize("name", ["small-clip", "small-siglip"])
def test_a_truncated_file_and_wrong_tensors_are_rejected(
    name: str, written: Written, assert_rejected: AssertRejected
) -> None:
    path = written(name)
    encoder = open_clip_encoder(name, weights=str(path))
    raw = path.read_bytes()
    tensors = safetensors.torch.load(raw)  # in memory, because a file that is truncated below must not be mapped
    first = min(key for key in tensors if key.startswith("visual.") and "blocks." in key)
    short = first.removeprefix("visual.").removeprefix("trunk.")
    path.write_bytes(raw[: len(raw) // 2])
    assert_rejected(encoder, r"small-.*\.safetensors: cannot be read")
    write_tensors(path, {key: tensor for key, tensor in tensors.items() if key != first})
    assert_rejected(encoder, rf"does not fit[\s\S]*missing .*{short}")
    write_tensors(path, {**tensors, f"{first}s": torch.zeros(1)})
    assert_rejected(encoder, rf"does not fit[\s\S]*unexpected {short}s")
    write_tensors(path, {**tensors, first: torch.zeros(1)})
    assert_rejected(encoder, rf"does not fit[\s\S]*{short}.* is \(1,\)")
    write_tensors(path, {key: tensor for key, tensor in tensors.items() if not key.startswith("visual.")})
    assert_rejected(encoder, r"has no tensor named visual\.")


def test_positions_that_cannot_be_resampled_are_rejected(written: Written, assert_rejected: AssertRejected) -> None:
    path = written("small-clip")
    write_tensors(path, {**load_file(path), "visual.positional_embedding": torch.zeros(13, WIDTH)})
    encoder = open_clip_encoder("small-clip", weights=str(path))
    assert_rejected(encoder, r"small-.*\.safetensors: does not fit the model")


def test_a_tag_is_downloaded_when_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[tuple[str, str]] = []

    def fail(repo: str, name: str) -> str:
        downloads.append((repo, name))
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with torch.device("meta"):
        encoder = open_clip_encoder("ViT-L-14-336-quickgelu", weights="openai")
    assert not downloads
    with pytest.raises(CheckpointError, match=r"cannot be downloaded from the Hub .*local-dir:DIRECTORY"):
        load_weights(encoder)
    assert downloads == [("timm/vit_large_patch14_clip_336.openai", "open_clip_model.safetensors")]


@pytest.mark.parametrize(
    ("model", "weights"),
    [("ViT-L-14-336", "openai"), ("ViT-L-14-336:openai", "none"), ("ViT-L-14-336:openai", "clip.safetensors")],
)
def test_weights_that_need_quickgelu_name_the_model_that_has_it(model: str, weights: str) -> None:
    with pytest.raises(ContractError, match=r"trained with QuickGELU.* write model: ViT-L-14-336-quickgelu$"):
        open_clip_encoder(model, weights=weights)


def test_weights_without_quickgelu_name_the_model_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-clip-quickgelu", {"mine": {"hf_hub": "a/b/"}})
    with pytest.raises(ContractError, match=r"trained without QuickGELU.*with it.* write model: small-clip$"):
        open_clip_encoder("small-clip-quickgelu", weights="mine")


def test_a_file_needs_the_tag_if_tags_differ(tagged: str) -> None:
    match = rf"the tags of '{tagged}' differ .* model: {tagged}:TAG with one of default, halves, quick$"
    with pytest.raises(ContractError, match=match):
        open_clip_encoder(tagged, weights="a.safetensors")
    assert open_clip_encoder(f"{tagged}:halves", weights="a.safetensors").mean == HALF


def test_other_patch_sizes_are_rejected_in_trunks_too(written: Written, assert_rejected: AssertRejected) -> None:
    path = written("small-siglip")
    weight = torch.zeros(96, 3, 8, 8)
    write_tensors(path, {**load_file(path), "visual.trunk.patch_embed.proj.weight": weight})
    assert_rejected(
        open_clip_encoder("small-siglip", weights=str(path)),
        "has 8 x 8-pixel patches, but the encoder uses 16 x 16-pixel patches",
    )
