"""Small versions of the papers' systems: trained for two steps per stage, saved, loaded, asked; also on two ranks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import ssmvl
from ssmvl.checkpoints import read_tensors, write_tensors
from ssmvl.data.scenes.scenes import digit_scenes
from ssmvl.data.shards import ensure_shards
from ssmvl.data.streams import read_records
from ssmvl.drawing.training_curves import read_scalars
from ssmvl.recipes.merge import Recipe

pytestmark = pytest.mark.filterwarnings("default")  # Composer, streaming and torch.distributed emit warnings
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
    """The recipe with the quickstart's encoders, a small language model, two steps per stage and a few digit scenes."""
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
    """Write weights and config of a small language model in the format of the recipe's weights; return their path."""
    torch.manual_seed(7)
    recipe = small(name, folder, "none")
    tensors = ssmvl.build_model(recipe).language.state_dict()
    if name == "mamba_vlm_7b":
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
        config = recipe.data["model"]["language"]["config"]
    else:
        tensors = {f"backbone.{key}": tensor for key, tensor in tensors.items()}
        config = {"ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16} if name == "ml_mamba" else {}}
    write_tensors(folder / "language.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
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
    unchanged = {key for key in final if torch.equal(final[key], start[key])}
    for key in final:
        part = key.split(".")[0]
        assert (key in unchanged) == (part not in trained), key
    if "align" in recipe.data["stages"]:
        aligned, _ = read_tensors(folder / "align" / "model" / "model.safetensors")
        changed = {key.split(".")[0] for key in aligned if not torch.equal(aligned[key], start[key])}
        assert changed == {"connector"}

    assistant = ssmvl.load(folder)
    questions, images = ["What is it?", "Hello there"], [Image.new("RGB", (60, 40), "red"), None]
    batched = assistant.generate(questions, images, max_new_tokens=4)
    single = [assistant.generate([q], [i], max_new_tokens=4)[0] for q, i in zip(questions, images, strict=True)]
    assert batched == single


@pytest.mark.slow
def test_two_ranks_train_like_one_and_wait_for_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composer: Callable[..., subprocess.Popen[str]]
) -> None:
    """Half of the samples are text only and a micro-batch is one sample, so sometimes only one rank has an image."""
    monkeypatch.chdir(tmp_path)
    records = read_records(digit_scenes("train", train_size=16, folder="scenes"))
    mixed = [record if at % 2 else {**record, "images": []} for at, record in enumerate(records)]
    changes = {"duration": "4ba", "microbatch": "1", "optimizer.lr": "1e-2"}
    one_rank: dict[str, dict[int, float]] = {}
    for name in ("mamba_vlm", "mamba_vlm_7b"):
        folder = tmp_path / name
        ensure_shards(folder / "data" / "train", lambda: mixed, len(mixed))
        recipe = small(name, folder, language_file(name, folder))
        recipe = ssmvl.load_recipe(recipe, *(f"stages.finetune.{key}={value}" for key, value in changes.items()))
        one_rank[name] = losses(ssmvl.train(recipe, f"run={name}-one-rank"))
        Path(f"{name}.yaml").write_text(recipe.to_yaml())
    script = Path(__file__).with_name("systems_script.py")
    process = composer("-n", "2", str(script), *(f"{name}.yaml" for name in one_rank), "report.json")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    reports = json.loads(Path("report.json").read_text())
    for name, expected in one_rank.items():
        assert len(expected) == 4
        assert losses(Path("runs") / name) == pytest.approx(expected, rel=1e-4)
        assert reports[name]["not_sharded"] == []
        assert {(0, 1), (1, 0)} <= set(zip(*reports[name]["images"], strict=True))


def losses(folder: Path) -> dict[int, float]:
    """Return the loss that a run logged in its stage `finetune`, by step."""
    return read_scalars(folder / "tensorboard" / f"{folder.name}-finetune")["loss/train/total"]
