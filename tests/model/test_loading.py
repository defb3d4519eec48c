"""Weights by name: finding, recognizing and loading them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import Hub

import ssmvl
from ssmvl.checkpoints import write_tensors
from ssmvl.errors import CheckpointError
from ssmvl.language.mamba_lm import MambaLM
from ssmvl.model.loading import open_weights
from ssmvl.plugins import components

SCRIPT = Path(__file__).with_name("memory_script.py")


def state_spaces_file(folder: Path, width: int, layers: int) -> str:
    """Write a language model in the layout of state-spaces; return its recipe node."""
    with torch.device("meta"):
        model = MambaLM(width=width, num_layers=layers, num_tokens=50277)
    half = {"dtype": torch.float16}  # like the published weights
    tensors = {f"backbone.{name}": torch.full(p.shape, 0.01, **half) for name, p in model.named_parameters()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"ssm_cfg": {"layer": "Mamba2"}}))
    mixer = "{name: mamba2, d_state: 128, head_dim: 64, num_groups: 1}"
    sizes = f"width: {width}, num_layers: {layers}, num_tokens: 50277"
    return f"{{name: mamba2_lm, {sizes}, mixer: {mixer}, weights: {folder}}}"


def share_of_memory(weights: str, dtype: str, *overrides: str) -> float:
    command = [sys.executable, str(SCRIPT), "quickstart", weights, dtype, *overrides]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.long
@pytest.mark.parametrize(
    ("width", "layers"), [(512, 8), pytest.param(1024, 48, marks=pytest.mark.slow)], ids=["small", "370m"]
)
def test_loading_makes_no_second_copy_of_the_weights(tmp_path: Path, width: int, layers: int) -> None:
    language = f"model.language={state_spaces_file(tmp_path, width, layers)}"
    ratios = {"recipe": share_of_memory("recipe", "bfloat16", language)}
    model = ssmvl.build_model("quickstart", language)
    (tmp_path / "own").mkdir()
    write_tensors(tmp_path / "own" / "model.safetensors", model.state_dict())
    ratios["own"] = share_of_memory(str(tmp_path / "own"), "bfloat16", language)
    assert max(ratios.values()) <= 1.1


def test_the_layout_of_a_plugin_is_recognized(tmp_path: Path, install_plugin: Callable[..., None]) -> None:
    install_plugin(
        "other",
        "import ssmvl\n"
        "from ssmvl.checkpoints import Layout\n"
        "def layout(names, config):\n"
        "    return Layout(part='language', rules={'*': ['lm.*']}) if 'lm.norm_f.weight' in names else None\n"
        "@ssmvl.hookimpl\n"
        "def ssmvl_register(register): register('checkpoint', 'other', layout)\n",
    )
    source, target = (MambaLM(width=64, num_layers=1, num_tokens=10) for _ in range(2))
    write_tensors(tmp_path / "x.safetensors", {f"lm.{name}": t for name, t in source.state_dict().items()})
    open_weights(tmp_path / "x.safetensors", "language").load(target)
    assert torch.equal(target.layers[0].mixer.in_proj.weight, source.layers[0].mixer.in_proj.weight)


def test_two_layouts_recognize_a_file_and_others_fail(
    tmp_path: Path, install_plugin: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin(
        "greedy",
        "import ssmvl\n"
        "from ssmvl.checkpoints import Layout\n"
        "@ssmvl.hookimpl\n"
        "def ssmvl_register(register):\n"
        "    for name in ('one', 'two'):\n"
        "        register('checkpoint', name, lambda names, config: Layout(part='language', rules={}))\n",
    )
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="one and two all recognize its names"):
        open_weights(tmp_path / "x.safetensors", "language")
    install_plugin(
        "broken",
        "import ssmvl\n"
        "from ssmvl.checkpoints import Layout\n"
        "@ssmvl.hookimpl\n"
        "def ssmvl_register(register):\n"
        "    register('checkpoint', 'bad', lambda names, config: config['missing'])\n"
        "    register('checkpoint', 'odd', lambda names, config: 5)\n"
        "    register('checkpoint', 'part', lambda names, config: Layout(part='langage', rules={}))\n",
    )
    monkeypatch.setenv("SSMVL_DISABLE_PLUGINS", "greedy")
    components.cache_clear()
    expected = (
        r"(?s)no registered layout.*checkpoint 'bad' failed: KeyError: 'missing'.*'odd' failed: .* must return a "
        r"Layout or None, returned 5.*'part' failed: .* must be one of 'language', 'encoder', 'model', "
        r"received 'langage'"
    )
    with pytest.raises(CheckpointError, match=expected):
        open_weights(tmp_path / "x.safetensors", "language")
    source = MambaLM(width=64, num_layers=1, num_tokens=10)
    write_tensors(tmp_path / "y.safetensors", {f"backbone.{name}": t for name, t in source.state_dict().items()})
    (tmp_path / "config.json").write_text('{"ssm_cfg": {"layer": "Mamba2"}}')
    assert open_weights(tmp_path / "y.safetensors", "language").layout.part == "language"


def test_unknown_names(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a.b": torch.zeros(1)})
    with pytest.raises(
        CheckpointError, match=r"no registered layout recognizes its names \(a\.b, …\)\. Layouts: .*ssmvl"
    ):
        open_weights(tmp_path / "x.safetensors", "model")
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or directory, and not a Hub model id"):
        open_weights("nowhere", "model")


def test_a_whole_model_is_not_a_language_model(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", ssmvl.build_model("quickstart").state_dict())
    with pytest.raises(
        CheckpointError,
        match=r"this file holds a whole model; load it with init_from of a stage, or weights= of build_model",
    ):
        open_weights(tmp_path, "language")


def test_the_default_dtype_is_restored_and_every_value_is_loaded(tmp_path: Path) -> None:
    source = ssmvl.build_model("quickstart")
    write_tensors(tmp_path / "model.safetensors", source.state_dict())
    before = torch.get_rng_state()
    loaded = ssmvl.build_model("quickstart", weights=tmp_path, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before), "no initial values are drawn"
    assert torch.get_default_dtype() == torch.float32
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name].double())


def test_a_file_that_does_not_fit_is_rejected_before_any_allocation(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", ssmvl.build_model("quickstart").state_dict())
    big = "model.language={width: 1000000, num_layers: 256}"  # 10 TB
    with pytest.raises(CheckpointError, match=r"(?s)does not fit the model.*and \d+ more"):
        ssmvl.build_model("quickstart", big, weights=tmp_path)


@pytest.mark.parametrize("name", ["a--b/c", "-a/b", "a/b..c", "a/" + "b" * 200, "~nouser/x", "x" * 5000, "a\0b/c"])
def test_malformed_names_give_short_errors(hub: Hub, name: str) -> None:
    with pytest.raises(CheckpointError) as error:
        open_weights(name, "model")
    assert len(str(error.value)) < 1500


def test_a_path_is_never_looked_up_on_the_hub(hub: Hub) -> None:
    for name in (Path("runs/quickstart"), "tests/quickstart.json", "nowhere"):
        with pytest.raises(CheckpointError, match="no such file or directory, and not a Hub model id"):
            open_weights(name, "model")
    assert hub.requests == []
