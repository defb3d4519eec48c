"""Building of models: devices, dtypes, overrides, weights, and components that violate their contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ssmvl
from ssmvl.errors import CheckpointError, ContractError, RecipeError
from ssmvl.model.build import build_processor


def test_meta_allocates_nothing_and_has_the_same_shapes() -> None:
    shapes = {name: p.shape for name, p in ssmvl.build_model("quickstart", device="meta").named_parameters()}
    real = ssmvl.build_model("quickstart")
    assert shapes == {name: p.shape for name, p in real.named_parameters()}
    assert {p.device.type for p in ssmvl.build_model("quickstart", device="meta").parameters()} == {"meta"}


def test_dtype_device_and_overrides() -> None:
    model = ssmvl.build_model("quickstart", "model.connector.scan_order=csm", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.connector.layers[0].mixer.folding.count == 4


def test_weights_are_loaded_only_on_request() -> None:
    plain, loaded = (
        ssmvl.build_model("quickstart", weights=w).encoders["fine"].state_dict() for w in ("none", "recipe")
    )
    name = "vit.blocks.0.attn.qkv.weight"
    assert not torch.equal(plain[name], loaded[name])


def test_a_directory_without_weights_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ssmvl.build_model("quickstart", weights=tmp_path)


def test_the_seed_determines_the_model() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(ssmvl.build_model("quickstart").state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_tokenizer_of_a_different_size_is_rejected() -> None:
    recipe = ssmvl.load_recipe("quickstart", "model.language.num_tokens=300")
    with pytest.raises(ContractError, match="num_tokens is 300, but tokenizer 'words' has 339 ids"):
        build_processor(recipe, ssmvl.build_model(recipe, device="meta"))


def test_a_component_that_violates_its_contract_is_named(install_plugin: Callable[..., None]) -> None:
    install_plugin(
        "halfway",
        "import ssmvl, torch\n"
        "def half(in_width, out_width, grid): return torch.nn.Linear(in_width, out_width)\n"
        "def none(in_width, out_width, grid): return 3\n"
        "@ssmvl.hookimpl\n"
        "def ssmvl_register(register):\n"
        "    register('connector', 'half', half)\n"
        "    register('connector', 'none', none)\n",
    )
    with pytest.raises(
        RecipeError, match=r"connector 'half' \(halfway 1.0 \(halfway\)\) lacks num_tokens, shard_units"
    ):
        ssmvl.build_model("quickstart", "model.connector=half")
    with pytest.raises(RecipeError, match=r"model\.connector: connector 'none'"):
        ssmvl.build_model("quickstart", "model.connector=none")


def test_a_scan_order_from_a_package_is_used(install_plugin: Callable[..., None]) -> None:
    install_plugin(
        "backwards",
        "import ssmvl, torch\n"
        "def order(grid, *, times: int = 1): return torch.arange(grid.length).flip(0).repeat(times, 1)\n"
        "@ssmvl.hookimpl\n"
        "def ssmvl_register(register): register('scan_order', 'backwards', 'backwards:order')\n",
    )
    model = ssmvl.build_model("quickstart", "model.connector.scan_order={name: backwards, times: 3}")
    assert model.connector.layers[0].mixer.folding.count == 3
    assert model.connector(torch.randn(1, 9, 256), model.grid).shape == (1, 9, 128)
