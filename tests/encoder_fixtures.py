"""Small open_clip models, their files, and fixtures for tests of encoders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from ssmvl_open_clip.encoders import open_clip_encoder
from standalone_weights import load_weights
from torch import nn

from ssmvl.checkpoints import write_tensors
from ssmvl.errors import CheckpointError

TEXT = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 3}
CLIP = {"image_size": 64, "layers": 4, "width": 32, "patch_size": 16, "head_width": 16}
TRUNK = {"timm_model_pretrained": False, "image_size": 160}
CONFIGS: dict[str, dict[str, Any]] = {
    "small-clip": {"vision_cfg": CLIP},
    "small-clip-quickgelu": {"vision_cfg": CLIP, "quick_gelu": True},
    "small-siglip": {
        "vision_cfg": {**TRUNK, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
        "custom_text": True,
    },
    "small-trunk": {  # with open_clip's own head
        "vision_cfg": {**TRUNK, "timm_model_name": "test_vit2", "timm_pool": "avg", "timm_proj": "linear"},
        "custom_text": True,
    },
}


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Add the small models to open_clip's table."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 24, "text_cfg": TEXT, **config}))
    before = dict(open_clip.factory._MODEL_CONFIGS)
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    open_clip.factory._MODEL_CONFIGS = before


def _build(name: str) -> Any:
    config = open_clip.get_model_config(name)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    return _randomize(kind(**config))


def _randomize(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def moved() -> Callable[[Any], Any]:
    """`moved(model)` sets every parameter to random values; some of timm's are zero-initialized."""
    return _randomize


@pytest.fixture
def whole(small_models: None) -> Callable[[str], Any]:
    """`whole("small-clip")` builds both towers with open_clip, with random values in every parameter."""
    return _build


@pytest.fixture
def written(small_models: None, tmp_path: Path) -> Callable[[str], Path]:
    """`written("small-clip")` writes a file in open_clip's layout, text tower included."""

    def write(name: str) -> Path:
        write_tensors(tmp_path / f"{name}.safetensors", _build(name).state_dict())
        return tmp_path / f"{name}.safetensors"

    return write


@pytest.fixture
def loaded(small_models: None) -> Callable[..., Any]:
    """`loaded("small-clip", path)` builds the encoder with the weights of that file."""

    def load(name: str, path: Path, **options: Any) -> Any:
        encoder = open_clip_encoder(name, weights=str(path), **options)
        load_weights(encoder)
        return encoder.eval()

    return load


@pytest.fixture
def assert_rejected() -> Callable[[nn.Module, str], None]:
    """`assert_rejected(encoder, match)`: loading its weights raises an error that matches, and changes nothing."""

    def check(encoder: Any, match: str) -> None:
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        with pytest.raises(CheckpointError, match=match):
            load_weights(encoder)
        assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())

    return check
