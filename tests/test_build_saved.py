"""Weights of a folder of ours, read into the model of another recipe: refused where shapes hide a difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import Hub

import ssmvl
from ssmvl.assistant import Assistant
from ssmvl.build import build_processor
from ssmvl.errors import CheckpointError

TWICE = (  # a scan order with as many paths as bsm
    "import ssmvl, torch\n"
    "def twice(grid): return torch.arange(grid.length).repeat(2, 1)\n"
    "@ssmvl.hookimpl\n"
    "def ssmvl_register(register): register('scan_order', 'twice', twice)\n"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model, saved."""
    recipe = ssmvl.load_recipe("quickstart")
    model = ssmvl.build_model(recipe)
    folder = tmp_path_factory.mktemp("run") / "model"
    Assistant(model, build_processor(recipe, model), recipe).save_pretrained(folder)
    return folder


def refusal(saved: Path, *overrides: str) -> list[str]:
    with pytest.raises(CheckpointError) as error:
        ssmvl.build_model("quickstart", *overrides, weights=saved)
    first, *lines, last = str(error.value).splitlines()
    assert first.startswith(f"{saved} holds weights of another model than ")
    assert last == "write into the recipe what they were saved with, or build from the folder itself"
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["model.connector.mixer.merge=sum"], ["model.connector.mixer.merge: saved with 'mean', here 'sum'"]),
        (
            ["model.language.mixer.dt_limit=[0.0, 1.0]", "model.language.mixer.norm_groups=2"],
            [
                "model.language.mixer.norm_groups: saved with 1, here 2",
                "model.language.mixer.dt_limit: saved with (0.0, inf), here (0.0, 1.0)",
            ],
        ),
        (
            ["model.fusion.order=[coarse, fine]"],
            ["model.fusion.order: saved with ['fine', 'coarse'], here ['coarse', 'fine']"],
        ),
        (["model.encoders.fine.stem=coarse"], ["model.encoders.fine.stem: saved with 'fine', here 'coarse'"]),
        (["model.language.tied=false"], ["model.language.tied: saved with True, here False"]),
    ],
)
def test_what_differs_is_listed(saved: Path, overrides: list[str], lines: list[str]) -> None:
    assert refusal(saved, *overrides) == lines


def test_another_component_an_option_of_it_and_an_encoder_more(saved: Path) -> None:
    coarse = "model.encoders={extra: {name: digit_vit, stem: coarse}}"
    lines = refusal(saved, coarse, "model.fusion=sequence", "model.fusion.order=[fine, coarse, extra]")
    assert lines == [
        "model.encoders: saved with the order fine, coarse, here the order fine, coarse, extra",
        "model.encoders.extra: saved with nothing, here encoder 'digit_vit' (ssmvl)",
        "model.encoders.extra.stem: saved with nothing, here 'coarse'",
        "model.fusion: saved with fusion 'channel' (ssmvl), here fusion 'sequence' (ssmvl)",
        "model.fusion.order: saved with ['fine', 'coarse'], here ['fine', 'coarse', 'extra']",
    ]


def test_another_scan_order_of_the_same_shapes(saved: Path, install_plugin: Callable[..., None]) -> None:
    install_plugin("twice", TWICE)
    assert refusal(saved, "model.connector.scan_order=twice") == [
        "model.connector.scan_order: saved with scan_order 'bsm' (ssmvl), here scan_order 'twice' (twice 1.0 (twice))"
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.connector.mixer.merge=mean", "model.language.mixer.norm_groups=1", "model.language.vocab_multiple=16"],
        ["model.language.mixer.dt_limit=[0, .inf]", "model.language.tied=true", "model.language.weights=other/model"],
        ["model.prompt=zephyr", "model.tokenizer=bytes", "seed=3", "stages.align.batch=8"],
    ],
)
def test_defaults_written_out_and_what_weights_do_not_depend_on(saved: Path, overrides: list[str]) -> None:
    model = ssmvl.build_model("quickstart", *overrides, weights=saved).state_dict()
    theirs = ssmvl.load(saved, device="cpu").model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.items())


def test_a_default_left_out_here_and_written_out_there(saved: Path) -> None:
    text = (saved / "recipe.yaml").read_text()
    left_out = text.replace("      scan_order: bsm\n", "").replace("    scan_order: bsm\n", "")
    assert left_out != text
    try:
        (saved / "recipe.yaml").write_text(left_out)
        ssmvl.build_model("quickstart", weights=saved)
    finally:
        (saved / "recipe.yaml").write_text(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("msc_advanced", "msc_gone"), r"model\.connector: no connector named 'msc_gone'"),
        (("model:", "modle:"), r"recipe\.yaml, which the weights were saved with, cannot be read: "),
    ],
)
def test_a_saved_recipe_that_cannot_be_read(saved: Path, tmp_path: Path, change: tuple[str, str], said: str) -> None:
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text((saved / "recipe.yaml").read_text().replace(*change))
    with pytest.raises(CheckpointError, match=said):
        ssmvl.build_model("quickstart", weights=tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    ssmvl.build_model("quickstart", weights=tmp_path)  # a file alone is compared by names and shapes


def test_a_saved_prompt_of_a_package_that_is_not_here(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    text = (saved / "recipe.yaml").read_text()
    assert "name: mamba\n" in text
    (tmp_path / "recipe.yaml").write_text(text.replace("name: mamba\n", "name: theirs\n"))
    ssmvl.build_model("quickstart", weights=tmp_path)


def test_a_saved_model_in_the_hub(saved: Path, hub: Hub) -> None:
    folder = hub.model("someone/small")
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    ssmvl.build_model("quickstart", weights="someone/small")
    with pytest.raises(CheckpointError, match=r"merge: saved with 'mean', here 'sum'"):
        ssmvl.build_model("quickstart", "model.connector.mixer.merge=sum", weights="someone/small")
