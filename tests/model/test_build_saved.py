"""A saved model loaded with a different recipe: differences that shapes do not show are rejected."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import Hub

import ssmvl
from ssmvl.checkpoints import read_tensors, write_tensors
from ssmvl.errors import CheckpointError
from ssmvl.generation.assistant import Assistant
from ssmvl.model.build import build_processor

TWICE = (  # a scan order with as many paths as bsm
    "import ssmvl, torch\n"
    "def twice(grid): return torch.arange(grid.length).repeat(2, 1)\n"
    "@ssmvl.hookimpl\n"
    "def ssmvl_register(register): register('scan_order', 'twice', twice)\n"
)


BOTH = (  # bsm under another name
    "import ssmvl, torch\n"
    "def both(grid): return torch.stack([torch.arange(grid.length), torch.arange(grid.length).flip(0)])\n"
    "@ssmvl.hookimpl\n"
    "def ssmvl_register(register): register('scan_order', 'both', both)\n"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model, saved."""
    recipe = ssmvl.load_recipe("quickstart")
    model = ssmvl.build_model(recipe)
    folder = tmp_path_factory.mktemp("run") / "model"
    Assistant(model, build_processor(recipe, model), recipe).save_pretrained(folder)
    return folder


def differences(saved: Path, *overrides: str) -> list[str]:
    """Lines of the error that list differences between the saved model and a recipe."""
    with pytest.raises(CheckpointError) as error:
        ssmvl.build_model("quickstart", *overrides, weights=saved)
    first, *lines, last = str(error.value).splitlines()
    assert first.startswith(f"{saved} holds weights of a different model than ")
    assert last == "change the recipe to match the saved one, or build from the directory itself"
    return [line.strip() for line in lines]


def each(layers: int, part: str, line: str) -> list[str]:
    return [f"{part}.layers.{i}.mixer.{line}" for i in range(layers)]


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            ["model.connector.mixer.merge=sum"],
            each(2, "connector", "folding.merge_by is 'sum', the checkpoint needs 'mean'"),
        ),
        (
            ["model.language.mixer.dt_limit=[0.0, 1.0]", "model.language.mixer.norm_groups=2"],
            [
                *each(4, "language", "dt_limit is (0.0, 1.0), the checkpoint needs (0.0, inf)"),
                *each(4, "language", "norm.groups is 2, the checkpoint needs 1"),
            ],
        ),
        (
            ["model.fusion.order=[coarse, fine]"],
            ["fusion.order is ('coarse', 'fine'), the checkpoint needs ('fine', 'coarse')"],
        ),
        (["model.language.tied=false"], ["language.lm_head is 'Linear', the checkpoint has none"]),
    ],
)
def test_differences_are_listed(saved: Path, overrides: list[str], lines: list[str]) -> None:
    assert sorted(differences(saved, *overrides)) == sorted(lines)


def test_a_different_stem_has_a_different_mean_and_std(saved: Path) -> None:
    mean, std, *stem = differences(saved, "model.encoders.fine.stem=coarse")
    assert mean == "encoders.fine.mean is (0.0, 0.0, 0.0), the checkpoint needs (0.5, 0.5, 0.5)"
    assert std == "encoders.fine.std is (1.0, 1.0, 1.0), the checkpoint needs (0.5, 0.5, 0.5)"
    assert stem
    assert all(line.startswith("encoders.fine.vit.patch_embed.layers.") for line in stem)


def test_a_different_component_and_an_additional_encoder(saved: Path) -> None:
    coarse = "model.encoders={extra: {name: digit_vit, stem: coarse}}"
    assert differences(saved, coarse, "model.fusion=sequence", "model.fusion.order=[fine, coarse, extra]") == [
        "encoders.extra is 'ssmvl.vision.encoders.VitEncoder', the checkpoint has none",
        "fusion is 'ssmvl.vision.fusion.SequenceFusion', the checkpoint needs 'ssmvl.vision.fusion.ChannelFusion'",
        "connector.paths.order is 'ssmvl.scans.bsm', the checkpoint needs 'ssmvl.scans.bsm'",  # on three maps
        "connector.paths.grid is Grid(maps=3, rows=3, columns=3), the checkpoint needs Grid(maps=1, rows=3, columns=3)",
        "connector.stem.0.in_features is 128, the checkpoint needs 256",
    ]


def test_only_the_first_differences_are_listed(saved: Path) -> None:
    assert differences(saved, "model.language.num_layers=40")[-1] == "and 16 more"


def test_a_different_scan_order_of_the_same_shapes(saved: Path, install_plugin: Callable[..., None]) -> None:
    install_plugin("twice", TWICE)
    assert differences(saved, "model.connector.scan_order=twice") == [
        "connector.paths.order is 'twice.twice', the checkpoint needs 'ssmvl.scans.bsm'"
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.connector.mixer.merge=mean", "model.language.mixer.norm_groups=1", "model.language.vocab_multiple=16"],
        ["model.language.mixer.dt_limit=[0, .inf]", "model.language.tied=true", "model.language.weights=other/model"],
        ["model.prompt=zephyr", "model.tokenizer=bytes", "seed=3", "stages.align.batch=8"],
        ["model.fusion={name: channel}"],
        ["model.language.mixer.dt_init=[0.2, 0.3]", "model.connector.mixer.A_init=[1.0, 2.0]"],
        ["model.connector.scan_order=both"],
    ],
)
def test_equal_models_may_be_written_differently(
    saved: Path, overrides: list[str], install_plugin: Callable[..., None]
) -> None:
    install_plugin("both", BOTH)
    model = ssmvl.build_model("quickstart", *overrides, weights=saved).state_dict()
    expected = ssmvl.load(saved, device="cpu").model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.items())


def test_a_default_may_be_omitted(saved: Path) -> None:
    text = (saved / "recipe.yaml").read_text()
    omitted = text.replace("      scan_order: bsm\n", "").replace("    scan_order: bsm\n", "")
    assert omitted != text
    try:
        (saved / "recipe.yaml").write_text(omitted)
        ssmvl.build_model("quickstart", weights=saved)
    finally:
        (saved / "recipe.yaml").write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("msc_advanced", "msc_gone"), r"model\.connector: unknown connector 'msc_gone'"),
        (("model:", "modle:"), r"recipe\.yaml, the recipe saved with the weights, cannot be built: "),
    ],
)
def test_a_saved_recipe_that_cannot_be_read(saved: Path, tmp_path: Path, change: tuple[str, str], message: str) -> None:
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text((saved / "recipe.yaml").read_text().replace(*change))
    with pytest.raises(CheckpointError, match=message):
        ssmvl.build_model("quickstart", weights=tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    ssmvl.build_model("quickstart", weights=tmp_path)  # without a recipe, names and shapes are compared


def test_a_saved_prompt_of_a_missing_package(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    text = (saved / "recipe.yaml").read_text()
    assert "name: mamba\n" in text
    (tmp_path / "recipe.yaml").write_text(text.replace("name: mamba\n", "name: missing\n"))
    ssmvl.build_model("quickstart", weights=tmp_path)


def test_a_saved_model_on_the_hub(saved: Path, hub: Hub) -> None:
    folder = hub.model("someone/small")
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = ssmvl.build_model("quickstart", weights="someone/small")
    expected = read_tensors(saved / "model.safetensors")[0]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


VIT = "name: timm, model: vit_small_patch16_224"


@pytest.mark.parametrize(
    ("saved_encoder", "encoder", "message"),
    [
        (f"{VIT}.dino", f"{VIT}, weights: dino", ""),
        (f"{VIT}.dino", f"{VIT}.dino, image_size: 224", ""),
        (f"{VIT}.augreg_in1k", f"{VIT}.augreg_in21k", ""),  # same mean and std; the values are those in the file
        (f"{VIT}.dino", VIT, "encoders.one.mean is (0.5, 0.5, 0.5), the checkpoint needs (0.485, 0.456, 0.406)"),
        (
            f"{VIT}, weights: dino",
            f"{VIT}, weights: augreg_in1k",
            "encoders.one.std is (0.5, 0.5, 0.5), the checkpoint needs (0.229, 0.224, 0.225)",
        ),
        (f"{VIT}.dino", f"{VIT}.dino, resize: resize-crop", "encoders.one.image_spec is ImageSpec(size=224"),
        (f"{VIT}.dino", f"{VIT}.dino, image_size: 240", "encoders.one.grid is Grid(maps=1, rows=15"),
    ],
)
def test_the_tag_of_an_encoder_matters_if_it_determines_mean_and_std(
    saved_encoder: str, encoder: str, message: str, tmp_path: Path
) -> None:
    def recipe(node: str) -> ssmvl.Recipe:
        others = ["model.encoders.fine=null", "model.encoders.coarse=null", "model.fusion.order=null"]
        return ssmvl.load_recipe("quickstart", *others, f"model.encoders.one={{{node}}}")

    write_tensors(tmp_path / "model.safetensors", {"language.none": torch.zeros(1)})
    (tmp_path / "recipe.yaml").write_text(recipe(saved_encoder).to_yaml())
    with pytest.raises(CheckpointError, match=re.escape(message or "model.safetensors does not fit the model")):
        ssmvl.build_model(recipe(encoder), weights=tmp_path)
