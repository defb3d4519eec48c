"""Vision-language models with a language model of transformers: generation, training, weights, saved models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ssmvl
from ssmvl.errors import CheckpointError, RecipeError
from ssmvl.generation.assistant import Assistant
from ssmvl.model.build import build_processor
from ssmvl.model.vlm import VisionLanguageModel
from ssmvl.processing.batch import collate, pad
from ssmvl.processing.processor import Processor
from ssmvl.recipes.merge import Recipe

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 260,
    "max_position_embeddings": 256,
}
PROMPTS = ["a", "what is this?", "", "x" * 90, "Which row?", "b", "cc"]
COLORS = ["red", None, "blue", "white", None, "green", "black"]


def recipe(**language: Any) -> Recipe:
    data = {
        "run": "causal",
        "seed": 0,
        "model": {
            "tokenizer": "bytes",
            "encoders": {"eye": {"name": "digit_vit", "stem": "fine"}},
            "fusion": {"name": "channel", "order": ["eye"]},
            "connector": {"name": "mlp"},
            "language": {"name": "causal_lm", "num_tokens": 257, "config": LLAMA, **language},
            "prompt": {"name": "mamba"},
        },
    }
    return Recipe(data, "causal.yaml")


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    torch.manual_seed(3)
    model = ssmvl.build_model(recipe())
    with torch.no_grad():
        for parameter in model.language.parameters():  # otherwise all answers would be equal
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return Assistant(model, build_processor(recipe(), model), recipe())


@pytest.fixture(scope="module")
def images() -> list[Image.Image | None]:
    return [c and Image.new("RGB", (50 + i, 40), c) for i, c in enumerate(COLORS)]


@pytest.mark.parametrize("size", [2, 7])
def test_answers_do_not_depend_on_the_batch(assistant: Assistant, images: list[Image.Image | None], size: int) -> None:
    alone = [assistant.generate([p], [i], max_new_tokens=16)[0] for p, i in zip(PROMPTS, images, strict=True)]
    together: list[str] = []
    for start in range(0, 7, size):
        part = slice(start, start + size)
        together += assistant.generate(PROMPTS[part], images[part], max_new_tokens=16)
    assert together == alone
    assert len(set(alone)) > 2


def test_prefill_and_steps_equal_forward(assistant: Assistant, images: list[Image.Image | None]) -> None:
    model, all_samples = assistant.model, samples(assistant.processor, images)
    inputs, lengths = pad(collate(all_samples)), torch.tensor([len(sample["ids"]) for sample in all_samples])
    rows, length = inputs["ids"].shape
    with torch.no_grad():
        state, visual = model.language.new_state(rows), model.encode(inputs["images"])
        logits = model.prefill(inputs["ids"], lengths, visual, inputs["image_positions"], state)
        ends = torch.arange(rows) * length + lengths - 1
        torch.testing.assert_close(logits, model(**{**inputs, "label_positions": ends}), atol=1e-4, rtol=1e-4)
        stepped = model.step(torch.arange(rows), state)
        longer = [
            {**s, **{key: torch.cat([s[key], torch.tensor([row])]) for key in ("ids", "labels")}}
            for row, s in enumerate(all_samples)
        ]
        again = pad(collate(longer))
        ends = torch.arange(rows) * again["ids"].shape[1] + lengths
        torch.testing.assert_close(stepped, model(**{**again, "label_positions": ends}), atol=1e-4, rtol=1e-4)


def samples(processor: Processor, images: list[Image.Image | None]) -> list[dict[str, Any]]:
    """Samples with answers of different lengths."""
    talks = ([{"role": "user", "content": p}, {"role": "assistant", "content": p[:5] or "?"}] for p in PROMPTS)
    return [processor.encode(t, [] if i is None else [i], train=True) for t, i in zip(talks, images, strict=True)]


@pytest.mark.filterwarnings("default")  # Composer warns at import
def test_composer_trains_it_on_padded_rows(assistant: Assistant, images: list[Image.Image | None]) -> None:
    from ssmvl.training.composer_model import ComposerVLM

    vlm = ComposerVLM(ssmvl.build_model(recipe()), ["connector", "language"])
    assert not vlm.packed
    all_samples = samples(assistant.processor, images)
    batch = collate(all_samples)
    outputs = vlm(batch)
    vlm.loss(outputs, batch).backward()
    gradients = {name: p.grad for name, p in vlm.model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values()), gradients.keys()
    alone = [vlm(collate([sample]))["logits"] for sample in all_samples]
    torch.testing.assert_close(outputs["logits"], torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_shard_units_are_its_layers(assistant: Assistant) -> None:
    model = assistant.model
    own = model.language.shard_units()
    units = {name for name, module in model.language.named_modules() if any(module is unit for unit in own)}
    assert units == {"model.model.layers.0", "model.model.layers.1"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_generates_the_same_answers(tied: bool, images: list[Image.Image | None], tmp_path: Path) -> None:
    own_recipe = recipe(config={**LLAMA, "tie_word_embeddings": tied})
    model = ssmvl.build_model(own_recipe)
    before = Assistant(model, build_processor(own_recipe, model), own_recipe)
    before.save_pretrained(tmp_path / "saved")
    after = ssmvl.load(tmp_path / "saved", device="cpu")
    head, embedding = after.model.language.model.lm_head.weight, after.model.language.model.model.embed_tokens.weight
    assert (head is embedding) == tied
    assert after.recipe.data["model"] == own_recipe.data["model"]
    assert after.generate(PROMPTS, images, max_new_tokens=4) == before.generate(PROMPTS, images, max_new_tokens=4)


def test_the_recipes_weights_are_loaded(tmp_path: Path) -> None:
    written = ssmvl.build_model(recipe()).language.model
    written.save_pretrained(tmp_path)
    with_weights = recipe(weights=str(tmp_path))
    model = ssmvl.build_model(with_weights, weights="recipe")
    assert isinstance(model, VisionLanguageModel)
    expected = written.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in model.language.model.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=r"model.config.rms_norm_eps is 1e-06, the checkpoint needs 0.5"):
        ssmvl.build_model(with_weights, weights="recipe")


def test_mistakes_in_the_configuration_are_found_on_meta() -> None:
    with pytest.raises(RecipeError, match=r"model.language: config of llama has no option 'hiden_size'. Did you mean"):
        ssmvl.build_model(recipe(config={**LLAMA, "hiden_size": 3}), device="meta")
    with pytest.raises(RecipeError, match=r"model.language.config: expected dict\[str, Any\], received 'llama'"):
        ssmvl.build_model(recipe(config="llama"), device="meta")
    with pytest.raises(RecipeError, match=r"model.language.config: language_model 'causal_lm' .* needs 'config'"):
        ssmvl.build_model(Recipe({"model": {**recipe().data["model"], "language": {"name": "causal_lm"}}}, "x"))
