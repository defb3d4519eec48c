"""Settings of the releases that shapes do not reveal: models that differ are rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_releases import HEAD, ML_MAMBA, STATE, ml_mamba_file

import ssmvl
from ssmvl.errors import CheckpointError
from ssmvl.model.loading import open_weights

TWICE = (  # a scan order with as many paths as bsm
    "import ssmvl, torch\n"
    "def twice(grid): return torch.arange(grid.length).repeat(2, 1)\n"
    "def mine(grid, *, back: bool = True):\n"
    "    return torch.stack([torch.arange(grid.length), torch.arange(grid.length).flip(0)])\n"
    "@ssmvl.hookimpl\n"
    "def ssmvl_register(register):\n"
    "    register('scan_order', 'twice', twice)\n"
    "    register('scan_order', 'mine', mine)\n"
)
MAMBA2_OPTIONS = f"name: mamba2, d_state: {STATE}, head_dim: {HEAD}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.fusion.order=[siglip, dinov2]",
            r"fusion.order is \['siglip', 'dinov2'\], .* needs \['dinov2', 'siglip'",
        ),
        (
            "model.connector.scan_order=twice",
            r"connector.paths.order is scan_order 'twice' .*, .* needs the paths of bsm",
        ),
        ("model.connector.mixer.merge=sum", "connector.layers.0.mixer.folding.merge_by is 'sum', .* needs 'mean'"),
        ("model.connector.mixer.norm_groups=2", "connector.layers.0.mixer.norm.groups is 2, .* needs 1"),
        (
            "model.connector.mixer.dt_limit=[0.0, 1.0]",
            r"connector.layers.0.mixer.dt_limit is \(0.0, 1.0\), .* needs \(0",
        ),
        (
            f"model.connector.mixer={{{MAMBA2_OPTIONS}, num_groups: 2, norm_groups: 1, d_state: {STATE // 2}}}".replace(
                f"d_state: {STATE},", ""
            ),
            "connector.layers.0.mixer.num_groups is 2, .* needs 1",
        ),
        ("model.language.mixer.norm_groups=2", "language.layers.0.mixer.norm.groups is 2, .* needs 1"),
        ("model.language.mixer.dt_limit=[0.001, .inf]", r"language.layers.0.mixer.dt_limit is \(0.001, inf\), "),
    ],
)
def test_settings_that_shapes_do_not_reveal_must_match(
    override: str, message: str, tmp_path: Path, install_plugin: Callable[..., None]
) -> None:
    install_plugin("twice", TWICE)
    torch.save({"model": ml_mamba_file()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        ssmvl.build_model("ml_mamba", *ML_MAMBA, override, weights=tmp_path / "x.pt")
    assert len(str(error.value).splitlines()) == 2, "nothing else differs"


@pytest.mark.parametrize(
    "override",
    [
        "model.connector.scan_order=mine",
        f"model.connector={{name: msc_advanced, mixer: {{{MAMBA2_OPTIONS}}}}}",
        "model.fusion={name: channel}",
    ],
)
def test_equivalent_options_are_accepted(override: str, tmp_path: Path, install_plugin: Callable[..., None]) -> None:
    install_plugin("twice", TWICE)
    parts = ml_mamba_file()
    torch.save({"model": parts}, tmp_path / "x.pt")
    model = ssmvl.build_model("ml_mamba", *ML_MAMBA, override, weights=tmp_path / "x.pt")
    assert torch.equal(model.state_dict()["connector.stem.0.weight"], parts["mlp"]["0.weight"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("connector.layers.0.mlp_norm.eps", 1e-6),
        ("connector.projector.0.eps", 1e-6),
        ("connector.layers.0.mixer.norm.eps", 1e-6),
        ("language.layers.0.mixer.norm.eps", 1e-6),
        ("language.layers.0.norm.eps", 1e-6),
        ("language.norm_f.eps", 1e-6),
    ],
)
def test_the_epsilons_of_norms_must_match(path: str, value: float, tmp_path: Path) -> None:
    torch.save({"model": ml_mamba_file()}, tmp_path / "x.pt")
    model = ssmvl.build_model("ml_mamba", *ML_MAMBA)
    holder, _, name = path.rpartition(".")
    setattr(model.get_submodule(holder), name, value)
    with pytest.raises(CheckpointError, match=rf"{path} is 1e-06, the checkpoint needs 1e-05"):
        open_weights(tmp_path / "x.pt", "model").load(model)


def test_resize_and_fusion_must_match(tmp_path: Path) -> None:
    torch.save({"model": ml_mamba_file()}, tmp_path / "x.pt")
    model = ssmvl.build_model("ml_mamba", *ML_MAMBA)
    siglip = model.encoders["siglip"]
    siglip.image_spec = siglip.image_spec._replace(resize="letterbox")

    class Sum(type(model.fusion)):  # with the same attributes
        pass

    model.fusion.__class__ = Sum
    match = r"siglip\.image_spec\.resize is 'letterbox', .*\n.*fusion\.__class__\.__name__ is 'Sum', .*'ChannelFusion'"
    with pytest.raises(CheckpointError, match=match):
        open_weights(tmp_path / "x.pt", "model").load(model)
