"""Small versions of the papers' systems: two steps a stage through Composer, saved, loaded, asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import ssmvl
from ssmvl.checkpoints import read_tensors, write_tensors
from ssmvl.data.scenes import digit_scenes
from ssmvl.recipe import Recipe

pytestmark = pytest.mark.filterwarnings(
    "default"
)  # Composer, streaming and torch.distributed warn on their own account
TOKENS = 257
MAMBA1 = ["model.language.width=32", "model.language.num_layers=2", "model.language.mixer={name: mamba1, d_state: 4}"]
MAMBA2 = [
    *MAMBA1[:2],
    "model.language.mixer={name: mamba2, d_state: 8, head_dim: 16}",
    "model.connector.mixer={name: mamba2, d_state: 8, head_dim: 16}",
]
LLAMA = [
    f"model.language.config.{key}={value}"
    for key, value in {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 264,
    }.items()
]
SYSTEMS = {
    "ml_mamba": MAMBA2,
    "cobra": MAMBA1,
    "vl_mamba": MAMBA1,
    "mamba_vlm": MAMBA1,
    "mamba_vlm_7b": LLAMA,
}


def small(name: str, folder: Path, language: str) -> Recipe:
    """The recipe with the quickstart's encoders, a small language model, two steps a stage and a few digit scenes."""
    data = ssmvl.load_recipe(name).data
    stems = zip(data["model"]["encoders"], ("fine", "coarse"), strict=False)
    encoders = [f"model.encoders.{key}={{name: digit_vit, stem: {stem}}}" for key, stem in stems]
    stages = []
    for stage in data["stages"]:
        if stage != "order":
            scenes = f"stages.{stage}.data={{name: shards, folder: {folder / 'data'}}}"
            sizes = {"batch": 4, "microbatch": 2, "duration": "2ba", "warmup": "0ba", "checkpoint": "2ba"}
            stages += [scenes, *(f"stages.{stage}.{key}={value}" for key, value in sizes.items())]
    text = ["model.tokenizer=bytes", f"model.language.num_tokens={TOKENS}", f"model.language.weights={language}"]
    return ssmvl.load_recipe(name, *encoders, *text, *SYSTEMS[name], *stages)


def language_file(name: str, folder: Path) -> str:
    """Weights of a small language model in the layout that the recipe's own come in; where they lie."""
    torch.manual_seed(7)
    language = ssmvl.build_model(small(name, folder, "none")).language
    prefix = "model." if name == "mamba_vlm_7b" else "backbone."
    tensors = {
        key.removeprefix("model.") if name == "mamba_vlm_7b" else prefix + key: tensor
        for key, tensor in language.state_dict().items()
    }
    write_tensors(folder / "language.safetensors", tensors)
    return str(folder / "language.safetensors")


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_small_version_trains_and_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shards = digit_scenes("train", train_size=16, folder=str(tmp_path / "scenes"))
    (tmp_path / "data").mkdir()
    shards.rename(tmp_path / "data" / "train")
    pretrained = language_file(name, tmp_path)
    recipe = small(name, tmp_path, pretrained)
    torch.manual_seed(0)
    start = ssmvl.build_model(recipe, weights="recipe").state_dict()

    folder = ssmvl.train(recipe)
    final, _ = read_tensors(folder / "model" / "model.safetensors")
    assert final.keys() == start.keys()
    trained = recipe.data["stages"]["finetune"]["train"]
    still = {key for key in final if torch.equal(final[key], start[key])}
    for key in final:
        part = key.split(".")[0]
        assert (key in still) == (part not in trained), key
    if "align" in recipe.data["stages"]:
        aligned, _ = read_tensors(folder / "align" / "model" / "model.safetensors")
        moved = {key.split(".")[0] for key in aligned if not torch.equal(aligned[key], start[key])}
        assert moved == {"connector"}

    assistant = ssmvl.load(folder)
    questions, images = ["What is it?", "Hello there"], [Image.new("RGB", (60, 40), "red"), None]
    together = assistant.generate(questions, images, max_new_tokens=4)
    alone = [assistant.generate([q], [i], max_new_tokens=4)[0] for q, i in zip(questions, images, strict=True)]
    assert together == alone
