"""Weights of any origin: wrapped names, encoders of plugins, and the plugins that a saved model needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ssmvl
from ssmvl.checkpoints import write_tensors
from ssmvl.errors import CheckpointError
from ssmvl.generation.assistant import Assistant
from ssmvl.model.blueprint import Blueprint
from ssmvl.model.build import opened_weights
from ssmvl.plugins import components

Install = Callable[[str, str], None]
ENCODER = """
import ssmvl, torch
from ssmvl.checkpoints import Layout
from ssmvl.interfaces import Grid, ImageSpec
from torch import nn

class Patches(nn.Module):
    width, grid, image_spec = 16, Grid(1, 3, 3), ImageSpec(48)
    def __init__(self, weights: str = "none"):
        super().__init__()
        self.weights = weights
        self.conv = nn.Conv2d(3, 16, 16, stride=16)
    def forward(self, pixels):
        return self.conv(pixels / 255).flatten(2).transpose(1, 2)
    def shard_units(self):
        return [self]

class Old(Patches):
    def __init__(self):
        super().__init__()
        del self.weights
    def load_weights(self):
        nn.init.constant_(self.conv.bias, 7)

def layout(names, config):
    if "patches.weight" in names:
        halve = lambda tensors, module: {name: tensor / 2 for name, tensor in tensors.items()}
        return Layout(part="encoder", rules={"conv.*": ["patches.*"]}, adapt=halve)

@ssmvl.hookimpl
def ssmvl_register(register):
    register("encoder", "patches", Patches)
    register("encoder", "old", Old)
    register("checkpoint", "patches_file", layout)
"""
PLAIN = ("model.fusion.order=null",)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Tensors of the quickstart's model."""
    torch.manual_seed(3)
    return ssmvl.build_model("quickstart").state_dict()


def assert_loaded(weights: str, tensors: Mapping[str, Tensor]) -> None:
    loaded = ssmvl.build_model("quickstart", weights=weights).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in tensors.items())


def lightning(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    wrapped = {f"model.{name}": tensor for name, tensor in tensors.items()}
    return {"state_dict": wrapped, "optimizer_states": [{"state": {0: torch.zeros(1)}}], "epoch": 3}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped_on_request(prefix: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "wrapped.pt"
    torch.save({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(
        CheckpointError, match=r"Each name begins with '.*', which a wrapper adds; unwrap:PATH strips it"
    ):
        ssmvl.build_model("quickstart", weights=path)
    assert_loaded(f"unwrap:{path}", tensors)


def test_a_checkpoint_of_lightning_is_unwrapped(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(lightning(tensors), path)
    assert_loaded(f"unwrap:{path}", tensors)
    with pytest.raises(CheckpointError):
        ssmvl.build_model("quickstart", weights=path)


def test_an_encoder_of_a_plugin_is_loaded_in_a_registered_layout(install_plugin: Install, tmp_path: Path) -> None:
    install_plugin("zz-patches", ENCODER)
    weight, bias, path = torch.randn(16, 3, 16, 16), torch.randn(16), tmp_path / "patches.safetensors"
    write_tensors(path, {"patches.weight": weight, "patches.bias": bias})
    override = f"model.encoders.fine={{name: patches, weights: {path}}}"
    conv = ssmvl.build_model("quickstart", *PLAIN, override, weights="recipe").encoders["fine"].conv
    assert torch.equal(conv.weight, weight / 2)
    assert torch.equal(conv.bias, bias / 2)
    write_tensors(path, {"patches.weight": weight[1:], "patches.bias": bias})
    with pytest.raises(CheckpointError, match=r"conv\.weight .* is \(15, 3, 16, 16\), the model has \(16, 3, 16, 16\)"):
        ssmvl.build_model("quickstart", *PLAIN, override, weights="recipe")
    with pytest.raises(
        CheckpointError, match=r"this file holds an encoder; load it with model\.encoders\.NAME\.weights"
    ):
        ssmvl.build_model("quickstart", weights=path)


def test_an_encoder_that_loads_its_own_weights_still_works(install_plugin: Install) -> None:
    install_plugin("zz-patches", ENCODER)
    expected = r"Old\.load_weights is deprecated .* 0\.4; name a file in `weights` instead"
    with pytest.warns(DeprecationWarning, match=expected):
        model = ssmvl.build_model("quickstart", *PLAIN, "model.encoders.fine=old", weights="recipe")
    assert model.encoders["fine"].conv.bias.tolist() == [7] * 16


def test_files_are_compared_once_and_before_any_allocation(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssmvl.checkpoints.layouts import Layout

    write_tensors(tmp_path / "model.safetensors", tensors)
    fitted: list[str] = []
    fit = Layout.fit
    monkeypatch.setattr(Layout, "fit", lambda *arguments: fitted.append(arguments[-1]) or fit(*arguments))
    blueprint = Blueprint.of("quickstart")
    opened = opened_weights(blueprint, tmp_path / "model.safetensors")
    assert len(fitted) == 1
    model = ssmvl.build_model(blueprint, weights=opened)
    assert len(fitted) == 1
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    ssmvl.build_model(blueprint, weights="recipe")
    assert len(fitted) == 3  # two encoders


def test_a_saved_model_names_the_plugins_that_it_needs(
    install_plugin: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("zz-patches", ENCODER)
    blueprint = Blueprint.of("quickstart", *PLAIN, "model.encoders.fine=patches")
    model, folder = ssmvl.build_model(blueprint), tmp_path / "saved"
    Assistant(model, blueprint.processor, blueprint.recipe).save_pretrained(folder)
    about = json.loads((folder / "ssmvl.json").read_text())
    assert about["plugins"] == [
        {"distribution": "ssmvl", "version": ssmvl.__version__, "name": "ml_mamba", "module": "ssmvl_ml_mamba"},
        {"distribution": "zz-patches", "version": "1.0", "name": "zz-patches", "module": "zz_patches"},
    ]
    ssmvl.load(folder, device="cpu")
    monkeypatch.setenv("SSMVL_DISABLE_PLUGINS", "zz-patches")
    components.cache_clear()
    with pytest.raises(CheckpointError, match=r"'zz-patches' of zz-patches 1\.0, which is disabled by SSMVL_DISABLE"):
        ssmvl.load(folder, device="cpu")
    monkeypatch.delenv("SSMVL_DISABLE_PLUGINS")
    (tmp_path / "zz_patches-1.0.dist-info" / "entry_points.txt").unlink()
    components.cache_clear()
    with pytest.raises(CheckpointError, match=r"which is not installed; pip install zz-patches==1\.0"):
        ssmvl.load(folder, device="cpu")
